"""A language model with known answers: exactly the right ones are kept, and every other one has its reason."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from scripted_endpoint import Reply, says, scripted, synthesis_config
from test_synthesis_sandbox import needs_bwrap

from data_pipelines.errors import InputError
from data_pipelines.files.records import read_rows
from data_pipelines.sources import jsonl
from data_pipelines.synthesis import collect as collecting
from data_pipelines.synthesis.code_route import CodeRoute
from data_pipelines.synthesis.endpoint import EndpointError
from data_pipelines.synthesis.topics import built_in, read_topics
from data_pipelines.synthesize import synthesize, yield_table

ROOT = Path(__file__).parents[3]
TOPICS = [f"topic {i}" for i in range(400)]

# --- the code route ---

GOOD = 'def add_{i}(x):\n    """Adds {i}."""\n    y = {i}\n    return x + y'
TESTS = "assert add_{i}(1) == {i} + 1\nassert add_{i}(-{i}) == 0\nassert add_{i}(0.5) == {i} + 0.5"


def sample(i, code=GOOD, tests=TESTS, task="Task: add {i}."):
    code, tests = code.replace("{i}", str(i)), tests.replace("{i}", str(i))
    return f"{task.replace('{i}', str(i))}\n\n```python\n{code}\n```\n\n```python\n{tests}\n```"


def with_body(*lines, before=""):
    """`add_{i}` with another body."""
    return before + 'def add_{i}(x):\n    """Adds {i}."""\n' + "\n".join(f"    {line}" for line in lines)


def mended(i, code=GOOD):
    return says(f"Of course!\n\n```python\n{code.replace('{i}', str(i))}\n```")


WRONG = with_body("y = {i} + 1", "return x + y")
BROKEN = GOOD + " +"
BUSY = Reply(b"busy", 429, {"Retry-After": "0"})
GONE = Reply(b"", 500)

# what is said, in this order, and what becomes of it
KEPT, REPAIRED = "kept", "repaired"
STORY = (
    (KEPT, ["good"]),
    (REPAIRED, [says(sample(1, WRONG)), mended(1)]),
    (REPAIRED, [says(sample(2, BROKEN)), mended(2)]),
    (REPAIRED, [says(sample(3, "1 / 0\n" + GOOD)), mended(3)]),
    (REPAIRED, [says(sample(4, with_body("while True:", "    pass"))), mended(4)]),
    ("fails_tests", [says(sample(5, WRONG)), mended(5, WRONG), mended(5)]),  # right in the second round: too late
    ("does_not_compile", [says(sample(6, BROKEN)), mended(6, BROKEN)]),
    ("does_not_run", [says(sample(7, "1 / 0\n" + GOOD)), mended(7, "1 / 0\n" + GOOD)]),
    ("missing_code", [says(sample(8, WRONG)), says("I cannot.")]),
    ("missing_tests", [says(sample(9, WRONG)), mended(9, GOOD.replace("add", "sub"))]),
    # answers in another form
    ("missing_task", [says(sample(10, task=""))]),
    ("missing_code", [says("Task: add.")]),
    ("missing_tests", [says(sample(12, tests=""))]),
    ("missing_tests", [says(sample(13, tests=TESTS + "\nimport os; os._exit(0)"))]),
    ("missing_name", [says(sample(14, "add = lambda x: x"))]),
    ("missing_annotation", [says(sample(15, GOOD.replace('"""Adds {i}."""', "pass")))]),
    # answers that are right, but not wanted
    ("vacuous_tests", [says(sample(16, tests="assert True\nassert add_{i}(1) or 1\nassert 'add_{i}'"))]),
    ("vacuous_tests", [says(sample(17, tests="assert True\nassert add_{i}(1) == 1 + {i}\nassert 1 < 2"))]),
    ("vacuous_tests", [says(sample(18, with_body("y = x", "return y == x"), "assert add_{i}(1)\n" * 3))]),
    ("short", [says(sample(19, with_body("return x + {i}")))]),
    ("duplicate", [says(sample(0, GOOD.replace("    ", "  ")).replace("Task: add 0.", "Task: add nought."))]),
    # hostile ones
    ("exits", [says(sample(21, with_body("os._exit(0)", before="import os\n"))), "same"]),
    ("exits", [says(sample(22, "import os\nos._exit(0)\n" + GOOD)), "same"]),
    ("time_limit", [says(sample(23, with_body("while True: pass"))), "same"]),
    ("memory_limit", [says(sample(24, with_body("return 'x' * 10**11"))), "same"]),
    ("output_limit", [says(sample(25, with_body("return 'x' * 10**7"))), "same"]),
    ("killed", [says(sample(26, with_body("os.kill(os.getpid(), 9)", before="import os\n"))), "same"]),
    ("fails_tests", [says(sample(27, with_body("open(CANARY, 'w').write('x')", "return {i} + x"))), "same"]),
    ("fails_tests", [says(sample(28, with_body("while True: os.fork()", before="import os\n"))), "same"]),
    ("fails_tests", [says(sample(29, with_body("class E(int): __eq__ = lambda *_: True", "return E(7)"))), "same"]),
    ("fails_tests", [says(sample(30, with_body("import urllib.request as u", "u.urlopen(URL)"))), "same"]),
    # replies that are no answers, and ones that come late
    ("malformed", [Reply(b"{")]),
    ("too_long", [Reply(b" " * (2 << 20))]),
    ("not_utf8", [Reply(b'{"choices": [{"message": {"content": "\xff"}}]}')]),
    ("cut_off", [says(sample(34), finish_reason="length")]),
    ("refused", [Reply(b"", 400)]),
    ("no_reply", [GONE, GONE, "good"]),
    (KEPT, [BUSY, "good"]),
    (KEPT, [Reply(b"x", seconds=30.0), "good"]),
    (KEPT, [Reply(b"x" * 40, cut=True), "good"]),
    (KEPT, ["good"]),
)  # fmt: skip


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    path = tmp_path_factory.mktemp("topics") / "topics.txt"
    path.write_text("\n".join(TOPICS))
    return str(path)


class Script:
    """Tells each prompt's story, whatever the order of the requests."""

    def __init__(self, story=STORY, **places):
        route = CodeRoute(synthesis_config("code").to_dict(), TOPICS, None)
        self.numbers = {route.prompt(i): i for i in range(len(story))}
        assert len(self.numbers) == len(story)
        self.story, self.places, self.lock = story, places, threading.Lock()
        self.asked, self.errors = Counter(), {}

    def __call__(self, body):
        i = self.numbers[body["messages"][0]["content"]]
        if len(body["messages"]) > 1:
            self.errors[i] = body["messages"][2]["content"]
        with self.lock:
            at = self.asked[i]
            self.asked[i] += 1
        replies = self.story[i][1]
        reply = replies[min(at, len(replies) - 1)]
        if reply == "good":
            reply = says(sample(i))
        if reply == "same":
            text = json.loads(replies[0].body)["choices"][0]["message"]["content"]
            reply = says(f"```{text.split('```')[1]}```")
        for name, value in self.places.items():
            reply = reply._replace(body=reply.body.replace(name.encode(), f"'{value}'".encode()))
        return reply

    def asked_by(self, server):
        """The numbers of the prompts that came first in a conversation."""
        return [self.numbers[r["messages"][0]["content"]] for r in server.requests if len(r["messages"]) == 1]


def run(script, output, topics, count=None, execute=True, concurrency=6, **others):
    """What `synthesize` returns, and the server as it was asked."""
    settings = {"topics": topics, "count": count or len(script.story), "execute": execute, "drop_short": 1.0, **others}
    quick = {"sandbox__cpu_s": 1.0, "endpoint__timeout_s": 5.0, "endpoint__concurrency": concurrency}
    with scripted(script) as server:
        return synthesize(synthesis_config("code", **quick, **settings), server.url, "m", output), server


def files(folder):
    return {name: (folder / name).read_bytes() for name in (collecting.ROWS, collecting.YIELD)}


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def told(tmp_path_factory, topics):
    """The whole story, told once: (script, yield, folder, canary, how often a server of ours was reached)."""
    folder = tmp_path_factory.mktemp("told")
    (folder / "canary").write_text("alive")
    with scripted(lambda body: says("reached")) as ours:
        script = Script(CANARY=folder / "canary", URL=ours.url)
        result, _ = run(script, folder / "out", topics)
        return script, result, folder / "out", folder / "canary", len(ours.requests)


@needs_bwrap
def test_exactly_the_right_ones_are_kept(told):
    rows = rows_of(told[2])
    kept = [i for i, (end, _) in enumerate(STORY) if end in (KEPT, REPAIRED)]
    assert [row["id"] for row in rows] == [f"code:{i}" for i in kept]
    for i, row in zip(kept, rows):
        assert row["messages"] == [
            {"role": "user", "content": f"add {i}."},
            {"role": "assistant", "content": f"```python\n{GOOD.replace('{i}', str(i))}\n```"},
        ]
        assert row["verified"] and row["checked"] == "tests" and len(row["tests"]) == 3 and len(row["topics"]) == 2


@needs_bwrap
def test_the_yield_adds_up_by_reason(told):
    _, result, folder, *_ = told
    ends = Counter(KEPT if end == REPAIRED else end for end, _ in STORY)
    assert {KEPT: result["kept"], **result["dropped"]} == ends
    assert result["prompts"] == len(STORY) == result["kept"] + sum(result["dropped"].values())
    assert result["repaired"] == sum(end == REPAIRED for end, _ in STORY)
    assert result == json.loads((folder / "yield.json").read_text())
    assert yield_table(result).row_count == 4 + len(result["dropped"])


@needs_bwrap
def test_what_fails_goes_back_once_with_its_error(told):
    script = told[0]
    again = {i for i, (_, replies) in enumerate(STORY) if "same" in replies or i in range(1, 10)}
    assert set(script.errors) == again
    assert all(script.asked[i] == 2 for i in again)
    for i, error in (
        (1, "assert add_1(1) == 1 + 1\nAssertionError\nadd_1(1) returned 3"),
        (2, "SyntaxError: invalid syntax (line 4)"),
        (3, "ZeroDivisionError: division by zero (line 1)"),
        (4, "TimeLimit: the CPU time was over"),
    ):
        assert error in script.errors[i]


@needs_bwrap
def test_nothing_escapes(told):
    *_, canary, reached = told
    assert canary.read_text() == "alive" and reached == 0


@needs_bwrap
def test_a_finished_run_asks_nothing(told, topics, tmp_path):
    _, result, folder, *_ = told
    shutil.copytree(folder, tmp_path / "out")
    script = Script()
    script.asked.update(dict.fromkeys(range(len(STORY)), 2))  # by now the server has its good day
    second, server = run(script, tmp_path / "out", topics)
    late = [i for i, (end, _) in enumerate(STORY) if end == "no_reply"]  # which is no end
    assert script.asked_by(server) == late
    assert second["kept"] == result["kept"] + 1 and "no_reply" not in second["dropped"]
    before = files(tmp_path / "out")
    third, server = run(script, tmp_path / "out", topics)
    assert not server.requests and third == second and files(tmp_path / "out") == before


@needs_bwrap
def test_one_test_is_enough_if_asked_for(topics, tmp_path):
    story = ((KEPT, [says(sample(0, tests=TESTS.replace("== 0", "== 1")))]), (KEPT, [says(sample(1, WRONG))]))
    result, _ = run(Script(story), tmp_path / "any", topics, require="any")
    assert result["kept"] == 1 and result["dropped"] == {"fails_tests": 1}
    assert rows_of(tmp_path / "any")[0]["tests"] == ["assert add_0(1) == 0 + 1", "assert add_0(0.5) == 0 + 0.5"]
    result, _ = run(Script(story), tmp_path / "all", topics)
    assert result["kept"] == 0


# --- without execution: everywhere ---

PARSED = (
    (KEPT, ["good"]),
    (KEPT, [says(sample(1, WRONG))]),  # nobody knows
    (REPAIRED, [says(sample(2, BROKEN)), mended(2)]),
    ("does_not_compile", [says(sample(3, BROKEN)), mended(3, BROKEN)]),
    ("missing_tests", [says(sample(4, tests="assert True"))]),
    (KEPT, [says(sample(5, "import os\nos._exit(0)\n" + GOOD))]),
    ("duplicate", [says(sample(0))]),
    ("malformed", [Reply(b"")]),
)  # fmt: skip


@pytest.mark.parametrize("concurrency", (1, 8))
def test_without_execution_rows_say_that_they_are_not_verified(concurrency, topics, tmp_path):
    result, _ = run(Script(PARSED), tmp_path, topics, execute=False, concurrency=concurrency)
    assert result["dropped"] == {"does_not_compile": 1, "duplicate": 1, "malformed": 1, "missing_tests": 1}
    found = [(row["id"], row["verified"], row["checked"]) for row in rows_of(tmp_path)]
    assert found == [(f"code:{i}", False, "parsed") for i in (0, 1, 2, 5)]
    assert result["checked"] == {"parsed": 4} and result["repaired"] == 1


def test_prepare_can_read_the_rows(topics, tmp_path):
    run(Script(PARSED), tmp_path, topics, execute=False)
    conversations = [c for where, row in read_rows(tmp_path / "rows.jsonl") for c in jsonl.convert(row, where)]
    assert len(conversations) == 4
    assert [(turn.role, turn.weight) for turn in conversations[0].turns] == [("user", 0.0), ("assistant", 1.0)]
    assert conversations[0].turns[1].text == f"```python\n{GOOD.replace('{i}', '0')}\n```"


def test_a_run_grows_and_goes_on(topics, tmp_path):
    whole, _ = run(Script(PARSED), tmp_path / "whole", topics, execute=False)
    run(Script(PARSED), tmp_path / "out", topics, count=3, execute=False)
    script = Script(PARSED)
    part, server = run(script, tmp_path / "out", topics, execute=False)
    assert part == whole and files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(script.asked_by(server)) == list(range(3, len(PARSED)))
    (tmp_path / "out/rows.jsonl").write_text("")  # damaged: written anew, without a request
    _, server = run(Script(PARSED), tmp_path / "out", topics, execute=False)
    assert not server.requests and files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_run_that_was_killed_comes_to_the_same(topics, tmp_path):
    """Wherever it was killed, and however many requests were made at a time."""
    run(Script(PARSED), tmp_path, topics, execute=False, concurrency=8)
    before, progress = files(tmp_path), (tmp_path / "progress.jsonl").read_bytes()
    for cut in (0, 1, 40, len(progress) // 2, len(progress) - 1):
        (tmp_path / "progress.jsonl").write_bytes(progress[:cut])
        (tmp_path / "yield.json").unlink()
        script = Script(PARSED)
        run(script, tmp_path, topics, execute=False, concurrency=1)
        assert files(tmp_path) == before
        assert len(script.asked) == len(PARSED) - max(0, progress[:cut].count(b"\n") - 1)


def test_folders_that_do_not_fit(topics, tmp_path):
    run(Script(PARSED), tmp_path, topics, 2, execute=False)
    for others, key in (({"seed": 1}, "seed"), ({"tests": (2, 5)}, "tests"), ({"request__max_tokens": 5}, "request")):
        with pytest.raises(InputError, match=f"other settings .differs in {key}.; expected the same, or another"):
            run(Script(PARSED), tmp_path, topics, 2, execute=False, **others)
    progress = tmp_path / "progress.jsonl"
    with progress.open("rb") as file:
        collecting.fcntl.flock(file, collecting.fcntl.LOCK_EX)
        with pytest.raises(InputError, match="found another run writing to it"):
            run(Script(PARSED), tmp_path, topics, 2, execute=False)
    progress.write_text(progress.read_text() + "{oops\n")
    with pytest.raises(InputError, match=r"progress.jsonl, line 4: found .*expected the log of a run"):
        run(Script(PARSED), tmp_path, topics, 2, execute=False)


def test_an_endpoint_that_is_gone_ends_the_run(topics, tmp_path):
    story = ((KEPT, ["good"]),) * 2 + (("no_reply", [GONE]),) * 60  # 20 in a row, whenever the good ones come
    with pytest.raises(EndpointError, match="found no reply to 20 prompts in a row: HTTP 500"):
        run(Script(story), tmp_path, topics, execute=False, endpoint__retries=0, concurrency=2)
    script = Script(((KEPT, ["good"]),) * 62)
    result, server = run(script, tmp_path, topics, execute=False)
    assert result["kept"] == 62 and set(script.asked_by(server)) == set(range(2, 62))


def test_prompts_are_a_function_of_seed_and_number():
    route, again = (CodeRoute(synthesis_config("code").to_dict(), TOPICS, None) for _ in range(2))
    assert [route.prompt(i) for i in reversed(range(50))] == [again.prompt(i) for i in range(50)][::-1]
    assert all(f"topics: {', '.join(route.chosen(i))}." in route.prompt(i) for i in range(50))
    other = CodeRoute(synthesis_config("code", seed=1).to_dict(), TOPICS, None)
    assert [route.chosen(i) for i in range(50)] != [other.chosen(i) for i in range(50)]
    finetune = CodeRoute(synthesis_config("code:finetune").to_dict(), TOPICS, None)
    assert {len(set(finetune.chosen(i))) for i in range(50)} == {3, 4, 5}
    assert route.chosen(0) == ["topic 263", "topic 54"]  # on every machine


def test_short_code_is_dropped_by_a_seeded_share(topics, tmp_path):
    short = tuple((KEPT, [says(sample(i, with_body("return x + {i}")))]) for i in range(30))
    for folder in (tmp_path / "a", tmp_path / "b"):
        result, _ = run(Script(short), folder, topics, execute=False, drop_short=0.5)
    assert files(tmp_path / "a") == files(tmp_path / "b") and 5 < result["dropped"]["short"] < 25


def test_topics(tmp_path):
    words = built_in()
    assert len(words) > 500 and len(set(words)) == len(words) and list(words) == sorted(words)
    assert {"queue", "sort", "cache"} <= set(words) and not {"the", "with", "winfo"} & set(words)
    path = tmp_path / "t.txt"
    path.write_text("a\n\n b \nc\nd\ne\na\n")
    assert read_topics(path) == ("a", "b", "c", "d", "e")
    long = b"a\nb\nc\nd\ne\n" + b"x" * 101
    for content, message in ((b"a\nb\n", "found 2 different topics"), (b"\xff", "UTF-8"), (long, "row 6")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_topics(path)


# --- configurations and the command ---


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"cuont": 3}, "config.cuont: found an unknown key; did you mean 'count'"),
        ({"sandbox__cpu": 3}, "config.sandbox.cpu: found an unknown key; did you mean 'cpu_s'"),
        ({"route": "maths"}, "config.drop_short: found an unknown key"),
        ({"route": "x"}, "config.route: found 'x'; expected code or maths"),
        ({"count": 0}, "config.count: found 0; expected more than 0"),
        ({"sandbox__wall_s": 0.0}, "config.sandbox.wall_s: found 0.0"),
        ({"require": "some"}, "config.require: found 'some'"),
        ({"words": (2, 99999)}, "config.words: found 2 to 99999 of"),
        ({"tests": (3, 4, 5)}, "config.tests: found .3, 4, 5.; expected two numbers"),
        ({"tests": (0, 5)}, "config.tests: found 0 to 5"),
        ({"topics": "/no/such"}, "/no/such: found .*No such file"),
    ),
)
def test_configurations_that_do_not_fit(changes, message, topics, tmp_path):
    with pytest.raises(InputError, match=message):
        synthesize(synthesis_config("code", **{"topics": topics, **changes}), "http://127.0.0.1:9", "m", tmp_path)


def command(*flags, **environment):
    line = [sys.executable, "-m", "data_pipelines.synthesize", "--config=configs/data/synthesis_code.py", *flags]
    return subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_the_command(topics, tmp_path):
    flags = [f"--config.topics={topics}", "--model=m", f"--output={tmp_path / 'out'}", "--config.drop_short=1.0"]
    flags += ["--config.endpoint.retries=0", "--config.count=8"]
    with scripted(Script(PARSED)) as server:
        done = command(*flags, f"--endpoint={server.url}", SYNTHESIS_API_KEY="top-secret")
    assert done.returncode == 0, done.stderr
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer top-secret"}
    assert done.stderr.count("NOT VERIFIED: nothing was executed") == 2
    for line in ("prompts +8 +100.0%", "kept +4 +50.0%", "after a repair +1", "dropped: malformed +1 +12.5%", "sha256"):
        assert re.search(line, done.stdout), done.stdout
    with scripted(lambda body: Reply(b"bad key", 401)) as server:
        refused = command(*flags, f"--endpoint={server.url}", "--config.count=99", SYNTHESIS_API_KEY="top-secret")
    assert refused.returncode == 1 and "HTTP 401" in refused.stderr and "Traceback" not in refused.stderr
    said = "".join((r.stdout + r.stderr) for r in (done, refused))
    assert "top-secret" not in said + "".join(p.read_text() for p in (tmp_path / "out").iterdir())


@needs_bwrap
def test_the_command_executes_if_asked_to(topics, tmp_path):
    flags = [f"--config.topics={topics}", "--config.count=2", "--execute", "--model=m", f"--output={tmp_path / 'out'}"]
    with scripted(Script(PARSED)) as server:
        done = command(*flags, f"--endpoint={server.url}")
    assert done.returncode == 0 and "NOT VERIFIED" not in done.stderr, done.stderr
    assert re.search("checked by tests +1", done.stdout) and re.search("dropped: fails_tests +1", done.stdout)
