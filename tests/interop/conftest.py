"""What several tests of the formats share."""

import json
import shutil

import pytest
import tiny

from easylm_plus.interop.huggingface import save_hf
from easylm_plus.interop.tensor_files import INDEX


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A Hugging Face folder of a model of our own with a tokenizer, in several files."""
    folder = tmp_path_factory.mktemp("hub") / "llama"
    model, params = tiny.model(vocab=300, scan_layers=True)
    (folder.parent / "words").mkdir()
    shutil.copytree(tiny.data() / "tokenizer", folder.parent / "words", dirs_exist_ok=True)
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    template += "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    (folder.parent / "words" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder.parent / "words" / "generation_config.json").write_text('{"temperature": 0.6}')
    save_hf(model, params, folder, max_shard_bytes=20_000, tokenizer_from=folder.parent / "words")
    assert (folder / INDEX).is_file()
    return folder
