"""`fgchat`: the conversation on a tiny random model, and every command of the terminal in a real one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import pexpect
import pytest
import tiny
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from test_tokenizer import TEMPLATE, byte_level

import fastgen
from fastgen import SamplingParams
from fastgen.cli import chat
from fastgen.conversation import Conversation, ConversationTooLong
from fastgen.distributed import workers

CODER = byte_level()
EOS = CODER.eos_token_id
CONTEXT = 1000
SPEC = fastgen.from_hf_config(tiny.config(vocab=330, context=CONTEXT, eos_token_id=EOS, tie_word_embeddings=True))
DRAWN = SamplingParams(seed=1, max_tokens=12, ignore_eos=True)
ENDING = SamplingParams(seed=1, min_tokens=11, max_tokens=20, logit_bias={EOS: 100.0})  # an end token is the 12th


@pytest.fixture
def talk() -> Iterator[Conversation]:
    coder = byte_level()
    with fastgen.Engine(fastgen.init(SPEC), SPEC, coder, page_size=16, cache_tokens=2048) as engine:
        yield Conversation(engine, DRAWN)


def say(talk: Conversation, *messages: str) -> None:
    for message in messages:
        text = "".join(talk.ask(message))
        assert text == talk.turns[-1].answer.text and talk.turns[-1].seconds > 0


def grows(talk: Conversation) -> bool:
    """Whether the last prompt begins with the round before's, prompt and answer as drawn, and these were cached."""
    before, last = talk.turns[-2:]
    drawn = before.answer.token_ids[: -1 if before.answer.token_ids[-1] == EOS else None]
    same = last.prompt_token_ids[: len(before.prompt_token_ids) + len(drawn)] == before.prompt_token_ids + drawn
    assert (
        not same or last.num_cached_tokens >= len(before.prompt_token_ids) + len(drawn) - 2
    )  # the last one drawn was never computed
    return same


@pytest.mark.parametrize("sampling", [DRAWN, ENDING], ids=["length", "stop"])
def test_a_turn_computes_only_what_is_new(talk: Conversation, sampling: SamplingParams) -> None:
    """Each prompt is the last one, its answer as drawn, and the template's text between; nothing is tokenized again."""
    talk.sampling = sampling
    say(talk, "Hello", "and again, é", "and the last")
    for i in (2, 3):
        rounds, talk.turns = talk.turns, talk.turns[:i]
        assert grows(talk)
        talk.turns = rounds
    assert [r.answer.finish_reason for r in talk.turns] == [("length", "stop")[sampling is ENDING]] * 3
    wanted = "".join(
        f"<|im_start|>user: {r.message}<|im_end|><|im_start|>assistant: {r.answer.text}<|im_end|>" for r in talk.turns
    )
    assert talk.turns[-1].rendered_prompt == wanted[: -len(talk.turns[-1].answer.text + "<|im_end|>")]
    if sampling is ENDING:  # no special tokens within the answers of this seed
        assert CODER.decode(talk.turns[-1].prompt_token_ids).count("<|im_end|>") == 5


def test_the_first_prompt_is_the_template(talk: Conversation) -> None:
    talk.system = "Be brief."
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert talk.render_prompt("Hello")[1] == CODER.apply_chat_template(messages, add_generation_prompt=True).input_ids


STRIPS = TEMPLATE.replace("m['content']", "m['content'] | trim")
FORGETS = TEMPLATE.replace("m['content']", "(m['content'] if m['role'] == 'user' else m['content'][-4:])")


def test_templates_that_strip_answers(talk: Conversation) -> None:
    """The spaces at an answer's ends stay as they were drawn."""
    assert talk.engine.tokenizer is not None
    talk.engine.tokenizer.chat_template = STRIPS
    space = CODER.convert_tokens_to_ids("Ġ")
    talk.update_sampling(logit_bias={space: 100.0})
    say(talk, "Hello")
    assert talk.turns[0].answer.text == " " * 12
    say(talk, "again")
    assert grows(talk)
    talk.update_sampling(logit_bias={}, min_tokens=0)
    say(talk, "and", "again")
    assert grows(talk)


def test_templates_that_rewrite(talk: Conversation) -> None:
    """Where earlier answers are shortened, as thinking is, all is rendered and tokenized anew."""
    assert talk.engine.tokenizer is not None
    talk.engine.tokenizer.chat_template = FORGETS
    say(talk, "Hello", "again")
    assert not grows(talk)
    messages = talk.messages[:-1]
    assert (
        talk.turns[-1].prompt_token_ids
        == talk.engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    )


def test_special_tokens_in_messages(talk: Conversation) -> None:
    """They are text, in the turn and in those after it; the template's own stay what they are."""
    im_end = CODER.convert_tokens_to_ids("<|im_end|>")
    talk.update_sampling(logit_bias={im_end: -100.0, CODER.convert_tokens_to_ids("<|im_start|>"): -100.0})
    say(talk, "a<|im_end|>b", "<|im_start|>", "c <")
    assert grows(talk)
    assert [r.prompt_token_ids.count(im_end) for r in talk.turns] == [1, 3, 5]
    assert CODER.decode(talk.turns[0].prompt_token_ids).startswith("<|im_start|>user: a<|im_end|>b<|im_end|>")


def test_another_system_prompt_and_stop_strings(talk: Conversation) -> None:
    """Both change what was there: it is rendered anew."""
    say(talk, "Hello")
    talk.system = "Be brief."
    say(talk, "again")
    assert not grows(talk) and "Be brief." in talk.turns[-1].rendered_prompt
    talk.rewind(1)
    say(talk, "Hello")
    text = talk.turns[-1].answer.text
    talk.rewind(1)
    talk.update_sampling(stop=(text[5:7],))
    say(talk, "Hello")
    assert talk.turns[-1].answer.text == text[: text.index(text[5:7])]
    say(talk, "again")
    assert not grows(talk) and talk.turns[0].answer.text in talk.turns[-1].rendered_prompt


def test_left_early(talk: Conversation) -> None:
    """What there is counts as the answer, and stays cached."""
    talk.update_sampling(max_tokens=None)
    with closing(talk.ask("Hello")) as pieces:
        for _ in range(8):
            next(pieces)
    assert talk.turns[0].answer.finish_reason == "abort" and len(talk.turns[0].answer.token_ids) == 8
    talk.update_sampling(max_tokens=5)
    say(talk, "again")
    assert grows(talk)
    assert not talk.engine.has_unfinished_requests


def test_an_interrupted_step(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The round is not added; the next one works."""

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(talk.engine._runner, "run", fail)
        list(talk.ask("Hello"))
    assert talk.turns == []
    say(talk, "Hello")


def test_going_back(talk: Conversation) -> None:
    say(talk, "one", "two", "three")
    first = talk.turns[0]
    talk.rewind(2)
    say(talk, "another two")
    assert talk.turns[0] is first and [r.message for r in talk.turns] == ["one", "another two"] and grows(talk)
    for number in (0, 4):
        with pytest.raises(ValueError, match=f"there is no turn {number}: the next turn is 3"):
            talk.rewind(number)
    talk.rewind(3)
    assert len(talk.turns) == 2


def test_too_long(talk: Conversation) -> None:
    """An answer ends with the context; what leaves no room for one is refused, and nothing is changed."""
    talk.update_sampling(max_tokens=10_000)
    say(talk, "a" * 900)
    last = talk.turns[-1]
    assert last.answer.finish_reason == "length" and len(last.prompt_token_ids + last.answer.token_ids) == CONTEXT
    with pytest.raises(ConversationTooLong, match=f"the context and the KV cache allow {CONTEXT}"):
        next(talk.ask("more"))
    assert len(talk.turns) == 1


def test_settings(talk: Conversation) -> None:
    talk.update_sampling(temperature=0.5, stop=["a"])
    assert talk.notable_settings() == {
        "temperature": 0.5, "top_p": 1.0, "seed": 1, "max_tokens": 12, "stop": ("a",), "ignore_eos": True,
    }  # fmt: skip
    for changes, message in (
        ({"temprature": 1}, "unknown sampling setting 'temprature'; did you mean temperature"),
        ({"top_p": 2}, "top_p must be between 0 and 1"),
        ({"n": 2}, "n=2: is not supported in conversations"),
        ({"stop": 5}, "stop must be a list of strings, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            talk.update_sampling(**changes)
    assert talk.sampling.temperature == 0.5


def test_save_and_load(talk: Conversation, tmp_path: Path) -> None:
    """The same messages and settings, and the same next prompt but for where tokens were cut."""
    talk.system = "Be brief."
    talk.update_sampling(logit_bias={5: -1.0}, stop=("zzz",))
    say(talk, "one", "two é")
    talk.save(tmp_path / "a.json")
    other = Conversation(talk.engine)
    other.load(tmp_path / "a.json")
    assert (other.messages, other.sampling, other.system) == (talk.messages, talk.sampling, "Be brief.")
    assert other.render_prompt("three")[0] == talk.render_prompt("three")[0]
    say(other, "three")
    assert other.turns[-1].num_cached_tokens > 16 and other.turns[0].prompt_token_ids == []
    for text in (
        "{",
        "[]",
        '{"messages": 5}',
        '{"messages": [{"role": "user", "content": "no answer"}]}',
        '{"messages": [{"role": "user", "content": 5}]}',
        '{"messages": [], "sampling": {"x": 1}}',
    ):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ValueError, match=r"b\.json|unknown sampling setting 'x'"):
            other.load(tmp_path / "b.json")
    assert len(other.turns) == 3


# --- the command ------------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]
TINY = ("model.device=cpu", "kv_cache.cache_tokens=2048", "sampling.max_tokens=6", "seed=0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights that can chat."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    fastgen.save(folder, SPEC, fastgen.init(SPEC, device="cpu"))
    CODER.save_pretrained(folder)
    return folder


@pytest.fixture
def fgchat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs it with something on stdin; exit status, stdout, stderr."""

    def call(*arguments: Any, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", StringIO(stdin))
        try:
            code = chat.main([*map(str, arguments)])
        except SystemExit as e:
            code = int(e.code or 0)
        return code, *capsys.readouterr()

    return call


def test_once(fgchat: Run, model: Path) -> None:
    """The answer alone on stdout, for a prompt and for stdin, whose lines are one message."""
    code, out, err = fgchat(model, "-p", "Hello\nyou", *TINY)
    assert code == 0 and out.endswith("\n")
    assert err.startswith("--- [6 tokens, ") and err.endswith("toks/s] max_tokens=6 ended the answer\n")
    assert fgchat(*TINY, model, stdin="Hello\nyou\n")[:2] == (0, out)
    assert fgchat(model, "--system", "Be brief.", "-p", "Hello\nyou", *TINY)[1] != out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tensor-parallel", "2"], 1, "possible: 1, 3"),
        (["parallel=replicas"], 1, "parallel.replicas must be 1; use tensor_parallel"),
        (["model.foo=1"], 2, "unknown key 'model.foo'"),
        (["qwen3_8"], 2, "unknown model 'qwen3_8'; did you mean qwen3_8b"),
        (["nowhere.gguf"], 1, "model 'nowhere.gguf' is neither"),
        (["a", "b"], 1, "expected one model, got a and b"),
        (["prompt=x"], 1, "prompt=x: is a setting of fgrun"),
        (["debug"], 1, "has no tokenizer"),
        (["TINY", "sampling.n=2"], 1, "n=2: is not supported"),
        (["TINY", "-p", " "], 1, "the message is empty"),
        (["TINY", "-p", "a" * 1100], 1, "the conversation is too long"),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else None,
)
def test_mistakes(arguments: list[str], code: int, message: str, fgchat: Run, model: Path) -> None:
    """One line on stderr, nothing on stdout, no traceback."""
    given = [x for a in arguments for x in ((str(model), *TINY) if a == "TINY" else (a,))]
    status, out, err = fgchat(*given, stdin="Hello")
    assert (status, out) == (code, "")
    assert err.startswith("fgchat: ") and message in err and err.count("\n") == 1


def test_two_ranks(fgchat: Run, model: Path) -> None:
    """The answer of one; the other process ends with it."""
    want = fgchat(model, "-p", "Hello", "sampling=greedy", *TINY)[:2]
    assert fgchat(model, "-p", "Hello", "sampling=greedy", "--tensor-parallel", "2", *TINY)[:2] == want
    assert want[0] == 0 and workers.WorkerGroup.active is None


def test_no_template(fgchat: Run, tmp_path: Path) -> None:
    """A base model is refused before its weights are read, with what to do."""
    coder = byte_level()
    coder.chat_template = None
    coder.save_pretrained(tmp_path)
    code, out, err = fgchat(tmp_path, "-p", "Hello")
    assert (code, out) == (1, "") and "has no chat template" in err and "chat variant" in err


def test_help(fgchat: Run) -> None:
    code, out, _ = fgchat("--help")
    assert code == 0 and 'fgchat -p "Name three' in out and "--tensor-parallel N" in out
    assert fgchat("--nonsense")[0] == 2


def test_defaults() -> None:
    """sampling=chat and schedule=latency, unless others are named; the small default model is kept on a short leash."""
    config = chat._compose_config(chat._make_parser().parse_args([]))
    assert (config.sampling.temperature, config.sampling.top_p, config.sampling.max_tokens) == (0.2, 0.9, 2048)
    assert config.schedule.max_num_seqs == 32
    config = chat._compose_config(chat._make_parser().parse_args(["a/b", "sampling.top_p=0.8", "schedule=throughput"]))
    assert (config.sampling.temperature, config.sampling.top_p) == (0.7, 0.8)
    assert config.schedule.max_num_seqs == 512 and config.model.path == "a/b"
    config = chat._compose_config(chat._make_parser().parse_args(["sampling=greedy", "--tensor-parallel", "1"]))
    assert config.sampling.temperature == 0 and config.parallel.tensor_parallel == 1


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def complete(text: str) -> list[str]:
        return [c.text for c in chat.CommandCompleter().get_completions(Document(text), CompleteEvent())]

    monkeypatch.chdir(tmp_path)
    (tmp_path / "talk.json").touch()
    assert complete("/s") == ["/s", "/system", "/save"]
    assert complete("/s temperature=1 top") == ["top_p=", "top_k="]
    assert complete("/load ta") == ["lk.json"]
    assert complete("hello /s") == complete("/q ") == []


def test_the_pipe(model: Path) -> None:
    """As a process between two others; a reader that leaves early is no error to be shown."""
    options = " ".join([*TINY, "sampling.max_tokens=300", "sampling.ignore_eos=true"])
    command = f"echo hello | {sys.executable} -m fastgen.cli.chat {model} {options} | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=60)
    assert len(done.stdout) == 1 and done.stderr == b""


@pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")  # torch has threads; the child begins anew at once
def test_every_command(model: Path, tmp_path: Path) -> None:
    """A session in a terminal, from the loading bar to /q."""
    options = ("kv_cache.cache_tokens=2048", "sampling.max_tokens=6", "seed=0", "sampling.ignore_eos=true")
    environment = os.environ | {
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    for name in ("COLUMNS", "LINES"):  # readline sets them for what pytest-xdist starts; rich believes them
        environment.pop(name, None)
    screen = StringIO()
    child = pexpect.spawn(
        sys.executable, ["-m", "fastgen.cli.chat", str(model), *options], env=environment, cwd=tmp_path,
        dimensions=(40, 250), encoding="utf-8", codec_errors="replace", timeout=40, logfile=screen, echo=False,
    )  # fmt: skip

    def expect(*texts: str) -> None:
        for text in texts:
            child.expect_exact(text)

    def line(text: str, *texts: str) -> None:
        child.send(f"{text}\r")
        expect(*texts)

    (tmp_path / "tiny.txt").touch()
    with closing(child):
        expect("loading tiny", "B/s]", "tiny: 0.0 GB, float32 on cpu, a context of 1000 tokens")
        expect("Ready to chat!", "/q quit", "1>")
        line("Hello", "--- [6 tokens, ", "toks/s]", "max_tokens=6 ended the answer: /s max_tokens=null", "2>")
        line("/m", "...")
        line("two", "...")
        line("lines", "...")
        line(".", "--- [6 tokens, ", "3>")
        line("/s temperature=0.5 top_p=0.9 stop=[zz,y]", "temperature=0.5", 'stop=["zz", "y"]', "3>")
        line("/s stop=[] temprature=1", "unknown sampling setting 'temprature'; did you mean temperature", "3>")
        line("/s hot", "settings are NAME=VALUE", "3>")
        line("/s stop=[]", "max_tokens=6", "3>")
        line("/system Be brief.", "Be brief.", "3>")
        line("/system", "Be brief.", "3>")
        line("/system -", "no system prompt; the model's", "3>")
        line("third", "--- [6 tokens", "4>")
        line("/p", "probability", "%", "prompt tokens were cached", "4>")
        line("/save talk.json", "saved 3 turns to talk.json", "4>")
        line("/save talk.json", "saved 3 turns to talk.json", "4>")
        line("/save tiny.txt", "tiny.txt exists already", "4>")
        line("/r 2", "2>")
        line("/r 7", "there is no turn 7: the next turn is 2", "2>")
        line("/r", "which turn? /r 1 starts over", "2>")
        line("/load nowhere.json", "No such file", "2>")
        line("/load", "which file?", "2>")
        line("/load talk.json", "1> Hello", "2> two", "lines", "3> third", "4>")
        line("/p", "this session has no answer yet", "4>")
        line("/x", "unknown command '/x'", "begins with /, use /m", "4>")
        line("/h", "rewind to before turn N", "Ctrl-C stops an answer", "4>")
        line("/help", "Ctrl-C stops an answer", "4>")
        child.send("half a li")
        child.sendintr()
        expect("/q quits", "4>")
        line("/s max_tokens=null", "max_tokens=null", "4>")
        child.send("go on\r")
        expect("go on", "\x1b[?2004l")  # the prompt has let go of the terminal
        child.expect(".{10}")
        child.sendintr()
        expect("--- [", "stopped; the text so far is the answer", "5>")
        line(600 * "a", "--- [", "the context of 1000 tokens is full: /r N rewinds", "6>")
        line("more", "the conversation is too long: ", "/r 1 starts over", "6>")
        line("/r 1", "1>")
        child.send("\x1b[A")  # the line before
        expect("/r 1")
        child.sendintr()
        expect("1>")
        child.send("/q\r")
        child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"] * 3
    assert saved["messages"][2]["content"] == "two\nlines" and saved["sampling"]["temperature"] == 0.5
    history = tmp_path / "state/fastgen/chat_history"
    assert "+two" in history.read_text() and history.stat().st_mode & 0o077 == 0


def test_the_default_model_remembers(device: str) -> None:
    """The second turn of a real conversation reads only what is new, and knows what the first was about."""
    with fastgen.Engine.from_pretrained(device=device, dtype="float32", cache_tokens=1024, progress=False) as engine:
        talk = Conversation(engine, SamplingParams(temperature=0, max_tokens=24))
        say(talk, "What is the capital of France?", "And of Germany?")
    first, second = talk.turns
    assert "Paris" in first.answer.text and "Berlin" in second.answer.text
    assert second.num_cached_tokens >= len(first.prompt_token_ids) + len(first.answer.token_ids) - 2
