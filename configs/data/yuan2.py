"""The pre-training mixture of Yuan 2.0, by the shares of table 2 of its paper (S. Wu et al., arXiv 2311.15786).

    python -m data_pipelines.prepare --config=configs/data/yuan2.py --input=RAW --output=data/yuan2

Yuan's own data was never published, so RAW is what stands in for it: one folder a domain, named as in SHARES, with
.jsonl or .jsonl.gz files of rows {"text": …}; instructions may also be rows of messages, in any shape that
data_pipelines/sources/jsonl.py reads. With --config.missing=skip domains may be absent, and the shares of the others
keep their proportions. (The Stack and its kin have their text under "content", and come in Parquet files: unpack them.)

Public data, all on Hugging Face unless said otherwise, each with terms of its own:

    python_en, javascript, java, c, cpp    bigcode/starcoderdata, the folders of these languages
    git_commits                            bigcode/starcoderdata, git-commits-cleaned
    notebooks_structured_en                bigcode/starcoderdata, jupyter-structured-text-clean-dedup
    notebooks_scripts_en                   bigcode/starcoderdata, jupyter-scripts-dedup-filtered
    notebooks_structured_cn, python_cn,    none: Python and notebooks with Chinese text and comments
    notebooks_scripts_cn
    code_instructions_cn                   none: Yuan made them up with GPT-3.5
    maths_cn                               Ape210K (github.com/Chenny0808/ape210k), Chinese word problems
    maths_instructions_cn                  BelleGroup/school_math_0.25M
    maths_instructions_en                  TIGER-Lab/MathInstruct, meta-math/MetaMathQA
    encyclopedia_cn                        "Baike" in the paper, not redistributable; instead wikimedia/wikipedia, zh
    books_cn                               not redistributable; web text such as Skywork/SkyPile-150B is no book
    dm_mathematics                         "DM": github.com/google-deepmind/mathematics_dataset
    arxiv, stackexchange                   togethercomputer/RedPajama-Data-1T
    wikipedia                              wikimedia/wikipedia, en
    books_en                               "Book3", withdrawn; instead Project Gutenberg, such as deepmind/pg19
    law                                    "Freelaw": free-law/Caselaw_Access_Project
    medical                                abstracts of PubMed (pubmed.ncbi.nlm.nih.gov)
    translation                            parallel sentences of OPUS (opus.nlpl.eu), a pair a document

What the paper does not say: how many tokens a domain has, so how often each was read (of 300 billion tokens in all);
whether the shares are of tokens, bytes or documents (we take tokens, as Yuan's tokenizer counts them); where the
Chinese books and encyclopedia come from; how anything but the synthetic code and maths was filtered or deduplicated.
The stages below are ours.
"""

from typing import Any

from ml_collections import ConfigDict

from data_pipelines.errors import InputError

# Hundredths of a percent. Table 2; they add up to 10,000.
SHARES = {
    "python_en": 927,
    "git_commits": 344,
    "javascript": 404,
    "java": 497,
    "c": 417,
    "cpp": 339,
    "notebooks_structured_en": 139,
    "notebooks_scripts_en": 174,
    "notebooks_structured_cn": 136,
    "python_cn": 573,
    "notebooks_scripts_cn": 173,
    "code_instructions_cn": 187,
    "maths_cn": 48,
    "maths_instructions_cn": 85,
    "maths_instructions_en": 290,
    "encyclopedia_cn": 1550,
    "books_cn": 1950,
    "dm_mathematics": 155,
    "arxiv": 700,
    "wikipedia": 100,
    "books_en": 306,
    "stackexchange": 78,
    "law": 197,
    "medical": 20,
    "translation": 211,
}
CODE = ("python_en", "git_commits", "javascript", "java", "c", "cpp", "notebooks_scripts_en", "python_cn")
CODE += ("notebooks_scripts_cn",)
CHINESE_PROSE = ("encyclopedia_cn", "books_cn")
ENGLISH_PROSE = ("wikipedia", "books_en", "stackexchange", "law", "medical")


def get_config(arg: str = "") -> ConfigDict:
    """No arguments."""
    if arg:
        raise InputError(f"configs/data/yuan2.py takes no arguments, found {arg!r}")
    return ConfigDict(
        {
            "sources": {name: source(name, share) for name, share in SHARES.items()},
            "weigh": "tokens",
            "stages": {"normalise": {}, "dedupe": {"exact": "whole", "near": "whole", "similarity": 0.8}},
            "heldout": 0.001,
            "policy": "skip",
            "missing": "error",
            "max_turn_chars": 10_000_000,  # a book
            "tokenizer": {"train": False},
        }
    )


def source(name: str, share: int) -> dict[str, Any]:
    stages: dict[str, Any] = {}
    if name in CODE:
        stages = {"normalise": {"code": True}}
    elif name in CHINESE_PROSE:
        stages = {"filter": {"languages": ("zh",), "min_chars": 200, "repetition": True, "chinese": {}}}
    elif name in ENGLISH_PROSE:
        stages = {"filter": {"languages": ("en",), "min_chars": 200, "repetition": True}}
    return {"kind": "jsonl", "weight": share, "patterns": (f"{name}/*.jsonl", f"{name}/*.jsonl.gz"), "stages": stages}
