"""Tests conversations with a tiny random model, and `fgchat` with every command in a real terminal."""

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

TOKENIZER = byte_level()
EOS = TOKENIZER.eos_token_id
CONTEXT = 1000
CONFIG = fastgen.from_hf_config(tiny.config(vocab=330, context=CONTEXT, eos_token_id=EOS, tie_word_embeddings=True))
FIXED_LENGTH = SamplingParams(seed=1, max_tokens=12, ignore_eos=True)
ENDING = SamplingParams(seed=1, min_tokens=11, max_tokens=20, logit_bias={EOS: 100.0})  # the 12th token is EOS


@pytest.fixture
def conversation() -> Iterator[Conversation]:
    coder = byte_level()
    with fastgen.Engine(fastgen.init(CONFIG), CONFIG, coder, page_size=16, cache_tokens=2048) as engine:
        yield Conversation(engine, FIXED_LENGTH)


def ask(conversation: Conversation, *messages: str) -> None:
    for message in messages:
        text = "".join(conversation.ask(message))
        assert text == conversation.turns[-1].answer.text and conversation.turns[-1].seconds > 0


def extends_last_turn(conversation: Conversation) -> bool:
    """Returns whether the last prompt begins with the previous turn's prompt and answer, which must be cached."""
    previous, last = conversation.turns[-2:]
    answer_ids = previous.answer.token_ids[: -1 if previous.answer.token_ids[-1] == EOS else None]
    turn_ids = previous.prompt_token_ids + answer_ids
    is_prefix = last.prompt_token_ids[: len(turn_ids)] == turn_ids
    assert not is_prefix or last.num_cached_tokens >= len(turn_ids) - 2  # the last sampled token was never computed
    return is_prefix


@pytest.mark.parametrize("sampling", [FIXED_LENGTH, ENDING], ids=["length", "stop"])
def test_a_turn_computes_only_what_is_new(conversation: Conversation, sampling: SamplingParams) -> None:
    """Each prompt is the last prompt, its sampled answer and the template's new text; nothing is tokenized again."""
    conversation.sampling = sampling
    ask(conversation, "Hello", "and again, é", "and the last")
    for i in (2, 3):
        turns, conversation.turns = conversation.turns, conversation.turns[:i]
        assert extends_last_turn(conversation)
        conversation.turns = turns
    assert [turn.answer.finish_reason for turn in conversation.turns] == [("length", "stop")[sampling is ENDING]] * 3
    expected = "".join(
        f"<|im_start|>user: {turn.message}<|im_end|><|im_start|>assistant: {turn.answer.text}<|im_end|>"
        for turn in conversation.turns
    )
    assert conversation.turns[-1].rendered_prompt == expected[: -len(conversation.turns[-1].answer.text + "<|im_end|>")]
    if sampling is ENDING:  # with this seed, the answers contain no special tokens
        assert TOKENIZER.decode(conversation.turns[-1].prompt_token_ids).count("<|im_end|>") == 5


def test_the_first_prompt_is_the_template(conversation: Conversation) -> None:
    conversation.system = "Be brief."
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert (
        conversation.render_prompt("Hello")[1]
        == TOKENIZER.apply_chat_template(messages, add_generation_prompt=True).input_ids
    )


STRIPPING = TEMPLATE.replace("m['content']", "m['content'] | trim")
SHORTENING = TEMPLATE.replace("m['content']", "(m['content'] if m['role'] == 'user' else m['content'][-4:])")


def test_templates_that_strip_answers(conversation: Conversation) -> None:
    """The prompt keeps the tokens of an answer's leading and trailing spaces as they were sampled."""
    assert conversation.engine.tokenizer is not None
    conversation.engine.tokenizer.chat_template = STRIPPING
    space = TOKENIZER.convert_tokens_to_ids("Ġ")
    conversation.update_sampling(logit_bias={space: 100.0})
    ask(conversation, "Hello")
    assert conversation.turns[0].answer.text == " " * 12
    ask(conversation, "again")
    assert extends_last_turn(conversation)
    conversation.update_sampling(logit_bias={}, min_tokens=0)
    ask(conversation, "and", "again")
    assert extends_last_turn(conversation)


def test_templates_that_rewrite(conversation: Conversation) -> None:
    """If a template shortens earlier answers, as for reasoning, the whole conversation is tokenized again."""
    assert conversation.engine.tokenizer is not None
    conversation.engine.tokenizer.chat_template = SHORTENING
    ask(conversation, "Hello", "again")
    assert not extends_last_turn(conversation)
    messages = conversation.messages[:-1]
    assert (
        conversation.turns[-1].prompt_token_ids
        == conversation.engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    )


def test_special_tokens_in_messages(conversation: Conversation) -> None:
    """In messages they are text, in this turn and later ones; those of the template are special tokens."""
    im_end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    conversation.update_sampling(logit_bias={im_end: -100.0, TOKENIZER.convert_tokens_to_ids("<|im_start|>"): -100.0})
    ask(conversation, "a<|im_end|>b", "<|im_start|>", "c <")
    assert extends_last_turn(conversation)
    assert [turn.prompt_token_ids.count(im_end) for turn in conversation.turns] == [1, 3, 5]
    assert TOKENIZER.decode(conversation.turns[0].prompt_token_ids).startswith(
        "<|im_start|>user: a<|im_end|>b<|im_end|>"
    )


def test_another_system_prompt_and_stop_strings(conversation: Conversation) -> None:
    """Both change earlier turns, so the conversation is rendered again."""
    ask(conversation, "Hello")
    conversation.system = "Be brief."
    ask(conversation, "again")
    assert not extends_last_turn(conversation) and "Be brief." in conversation.turns[-1].rendered_prompt
    conversation.rewind(1)
    ask(conversation, "Hello")
    text = conversation.turns[-1].answer.text
    conversation.rewind(1)
    conversation.update_sampling(stop=(text[5:7],))
    ask(conversation, "Hello")
    assert conversation.turns[-1].answer.text == text[: text.index(text[5:7])]
    ask(conversation, "again")
    assert (
        not extends_last_turn(conversation)
        and conversation.turns[0].answer.text in conversation.turns[-1].rendered_prompt
    )


def test_closing_the_generator_ends_the_answer(conversation: Conversation) -> None:
    """The text so far becomes the answer, and stays cached."""
    conversation.update_sampling(max_tokens=None)
    with closing(conversation.ask("Hello")) as pieces:
        for _ in range(8):
            next(pieces)
    assert conversation.turns[0].answer.finish_reason == "abort" and len(conversation.turns[0].answer.token_ids) == 8
    conversation.update_sampling(max_tokens=5)
    ask(conversation, "again")
    assert extends_last_turn(conversation)
    assert not conversation.engine.has_unfinished_requests


def test_an_interrupted_step(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The turn is not added; the next one works."""

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(conversation.engine.runner, "forward", fail)
        list(conversation.ask("Hello"))
    assert conversation.turns == []
    ask(conversation, "Hello")


def test_rewind(conversation: Conversation) -> None:
    ask(conversation, "one", "two", "three")
    first = conversation.turns[0]
    conversation.rewind(2)
    ask(conversation, "another two")
    assert (
        conversation.turns[0] is first
        and [turn.message for turn in conversation.turns] == ["one", "another two"]
        and extends_last_turn(conversation)
    )
    for number in (0, 4):
        with pytest.raises(ValueError, match=f"there is no turn {number}: the next turn is 3"):
            conversation.rewind(number)
    conversation.rewind(3)
    assert len(conversation.turns) == 2


def test_too_long(conversation: Conversation) -> None:
    """An answer ends when the context is full. A message that leaves no space for one is rejected without effect."""
    conversation.update_sampling(max_tokens=10_000)
    ask(conversation, "a" * 900)
    last = conversation.turns[-1]
    assert last.answer.finish_reason == "length" and len(last.prompt_token_ids + last.answer.token_ids) == CONTEXT
    with pytest.raises(ConversationTooLong, match=f"the context and the KV cache allow {CONTEXT}"):
        next(conversation.ask("more"))
    assert len(conversation.turns) == 1


def test_settings(conversation: Conversation) -> None:
    conversation.update_sampling(temperature=0.5, stop=["a"])
    assert conversation.notable_settings() == {
        "temperature": 0.5, "top_p": 1.0, "seed": 1, "max_tokens": 12, "stop": ("a",), "ignore_eos": True,
    }  # fmt: skip
    for changes, message in (
        ({"temprature": 1}, "unknown sampling setting 'temprature'; did you mean temperature"),
        ({"top_p": 2}, "top_p must be between 0 and 1"),
        ({"n": 2}, "n=2: is not supported in conversations"),
        ({"stop": 5}, "stop must be a list of strings, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            conversation.update_sampling(**changes)
    assert conversation.sampling.temperature == 0.5


def test_save_and_load(conversation: Conversation, tmp_path: Path) -> None:
    """Loading restores messages, settings and the rendered prompt, but not the tokens of answers."""
    conversation.system = "Be brief."
    conversation.update_sampling(logit_bias={5: -1.0}, stop=("zzz",))
    ask(conversation, "one", "two é")
    conversation.save(tmp_path / "a.json")
    other = Conversation(conversation.engine)
    other.load(tmp_path / "a.json")
    assert (other.messages, other.sampling, other.system) == (conversation.messages, conversation.sampling, "Be brief.")
    assert other.render_prompt("three")[0] == conversation.render_prompt("three")[0]
    ask(other, "three")
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
    """Returns the folder of a checkpoint with random weights and a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    fastgen.save(folder, CONFIG, fastgen.init(CONFIG, device="cpu"))
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def fgchat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Returns a function that runs fgchat with a text on stdin and returns exit status, stdout and stderr."""

    def call(*arguments: Any, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", StringIO(stdin))
        try:
            code = chat.main([*map(str, arguments)])
        except SystemExit as e:
            code = int(e.code or 0)
        return code, *capsys.readouterr()

    return call


def test_single_message(fgchat: Run, model: Path) -> None:
    """Only the answer goes to stdout, for -p and for stdin, whose lines are one message."""
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
        (["prompt=x"], 1, "prompt=x: is a setting of fgrun"),
        (["debug"], 1, "has no tokenizer"),
        (["TINY", "sampling.n=2"], 1, "n=2: is not supported"),
        (["TINY", "-p", " "], 1, "the message is empty"),
        (["TINY", "-p", "a" * 1100], 1, "the conversation is too long"),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else None,
)
def test_mistakes(arguments: list[str], code: int, message: str, fgchat: Run, model: Path) -> None:
    """An error prints one line to stderr and nothing to stdout, without a traceback."""
    expanded = [x for a in arguments for x in ((str(model), *TINY) if a == "TINY" else (a,))]
    status, out, err = fgchat(*expanded, stdin="Hello")
    assert (status, out) == (code, "")
    assert err.startswith("fgchat: ") and message in err and err.count("\n") == 1


def test_two_ranks(fgchat: Run, model: Path) -> None:
    """Two ranks give the same answer as one, and the worker process ends with the command."""
    expected = fgchat(model, "-p", "Hello", "sampling=greedy", *TINY)[:2]
    assert fgchat(model, "-p", "Hello", "sampling=greedy", "--tensor-parallel", "2", *TINY)[:2] == expected
    assert expected[0] == 0 and workers.WorkerGroup.active is None


def test_no_template(fgchat: Run, tmp_path: Path) -> None:
    """A base model is rejected before its weights are loaded, with advice."""
    coder = byte_level()
    coder.chat_template = None
    coder.save_pretrained(tmp_path)
    code, out, err = fgchat(tmp_path, "-p", "Hello")
    assert (code, out) == (1, "") and "has no chat template" in err and "chat variant" in err


def test_help(fgchat: Run) -> None:
    code, out, _ = fgchat("--help")
    assert code == 0 and 'fgchat -p "Name three' in out and "--tensor-parallel N" in out
    assert fgchat("--nonsense")[0] == 2


def test_chat_template(fgchat: Run, model: Path, tmp_path: Path) -> None:
    """fgchat renders chats with a template of its own file and with variables; Conversation takes the same options."""
    (file := tmp_path / "own.jinja").write_text(
        "{% if not city %}{{ raise_exception('no city') }}{% endif %}{{ city }}: {{ messages[-1].content }}"
    )
    options = (model, "-p", "Hello", f"chat_template={file}", *TINY)
    code, out, err = fgchat(*options)
    assert (code, out) == (1, "") and "this chat template refuses these messages: no city" in err
    assert fgchat(*options, "chat_template_kwargs.city=Rome")[0] == 0
    code, _, err = fgchat(model, "-p", "Hello", "tools=tools.json")
    assert code == 1 and "tools=tools.json: is a setting of fgrun" in err
    with fastgen.Engine(fastgen.init(CONFIG), CONFIG, byte_level(), cache_tokens=256) as engine:
        template: Any = {"chat_template": file.read_text(), "chat_template_kwargs": {"city": "Rome"}}
        assert Conversation(engine, **template).render_prompt("Hello")[0] == "Rome: Hello"


def test_defaults() -> None:
    """The defaults are sampling=chat and schedule=latency, and a low temperature for the default model."""
    config = chat._compose_config(chat._parse([]))
    assert (config.sampling.temperature, config.sampling.top_p, config.sampling.max_tokens) == (0.2, 0.9, 2048)
    assert config.schedule.max_num_seqs == 32
    config = chat._compose_config(chat._parse(["a/b", "sampling.top_p=0.8", "schedule=throughput"]))
    assert (config.sampling.temperature, config.sampling.top_p) == (0.7, 0.8)
    assert config.schedule.max_num_seqs == 512 and config.model.path == "a/b"
    config = chat._compose_config(chat._parse(["sampling=greedy", "--tensor-parallel", "1"]))
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


def test_pipe(model: Path) -> None:
    """Between two other processes, a reader that exits early causes no error message."""
    options = " ".join([*TINY, "sampling.max_tokens=300", "sampling.ignore_eos=true"])
    command = f"echo hello | {sys.executable} -m fastgen.cli.chat {model} {options} | head -c 1"
    process = subprocess.run(command, shell=True, capture_output=True, timeout=60)
    assert len(process.stdout) == 1 and process.stderr == b""


@pytest.mark.filterwarnings(
    "ignore:.*forkpty:DeprecationWarning"
)  # torch has threads, but the child calls exec at once
def test_every_command(model: Path, tmp_path: Path) -> None:
    """A terminal session, from the progress bar to /q."""
    options = ("kv_cache.cache_tokens=2048", "sampling.max_tokens=6", "seed=0", "sampling.ignore_eos=true")
    environment = os.environ | {
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    for name in ("COLUMNS", "LINES"):  # readline sets them in pytest-xdist's workers, and rich would use them
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
        expect("go on", "\x1b[?2004l")  # the prompt has released the terminal
        child.expect(".{10}")
        child.sendintr()
        expect("--- [", "stopped; the text so far is the answer", "5>")
        line(600 * "a", "--- [", "the context of 1000 tokens is full: /r N rewinds", "6>")
        line("more", "the conversation is too long: ", "/r 1 starts over", "6>")
        line("/r 1", "1>")
        child.send("\x1b[A")  # recall the previous line
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


def test_default_model_uses_earlier_turns(device: str) -> None:
    """The second turn of a real conversation computes only the new tokens, and refers to the first turn."""
    with fastgen.Engine.from_pretrained(device=device, dtype="float32", cache_tokens=1024, progress=False) as engine:
        conversation = Conversation(engine, SamplingParams(temperature=0, max_tokens=24))
        ask(conversation, "What is the capital of France?", "And of Germany?")
    first, second = conversation.turns
    assert "Paris" in first.answer.text and "Berlin" in second.answer.text
    assert second.num_cached_tokens >= len(first.prompt_token_ids) + len(first.answer.token_ids) - 2
