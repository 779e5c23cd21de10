from dataclasses import dataclass
from typing import Literal

import pytest

from cli.options import options_of
from cli.resolve import Command, Group, resolve
from protocol.errors import StartupError
from protocol.settings import setting


@dataclass(frozen=True, slots=True)
class Example:
    model: str | None = setting(None, help="a model")
    max_num_seqs: int = setting(8, minimum=1, maximum=64, help="sequences")
    share: float = setting(0.5, minimum=0.0, maximum=1.0, help="a share")
    enable_cache: bool = setting(True, help="cache")
    names: tuple[str, ...] = setting((), help="names")
    mode: str = setting("fast", choices=("fast", "safe"), help="mode")
    token: str | None = setting(None, secret=True, help="a secret")


COMMAND = Command("example", "An example.", (Group(Example, "Example"),), positional="model")


def read(*argv: str, **environ: str) -> Example:
    return resolve(COMMAND, argv, environ).config(Example)


def refusal(*argv: str, **environ: str) -> str:
    with pytest.raises(StartupError) as caught:
        read(*argv, **environ)
    return str(caught.value)


def test_defaults_hold_when_nothing_is_said():
    assert read() == Example()


def test_flags_win_over_variables_and_those_over_the_file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("max-num-seqs: 1\nshare: 0.1\nmode: safe\nnames: [a, b]\n")
    environ = {"TANDEM_CONFIG": str(path), "TANDEM_SHARE": "0.2", "TANDEM_MAX_NUM_SEQS": "2"}
    assert read("--max-num-seqs", "3", **environ) == Example(
        max_num_seqs=3, share=0.2, mode="safe", names=("a", "b")
    )


@pytest.mark.parametrize(
    ("argv", "environ", "wanted"),
    [
        (("--no-enable-cache",), {}, Example(enable_cache=False)),
        ((), {"TANDEM_ENABLE_CACHE": "off"}, Example(enable_cache=False)),
        (("--enable-cache",), {"TANDEM_ENABLE_CACHE": "0"}, Example()),
        (("--names", "a", "b"), {}, Example(names=("a", "b"))),
        ((), {"TANDEM_NAMES": "a, b"}, Example(names=("a", "b"))),
        (("folder/model",), {}, Example(model="folder/model")),
        (("--model", "folder/model"), {}, Example(model="folder/model")),
        (("--share=1",), {}, Example(share=1.0)),
    ],
)
def test_every_form_is_read(argv, environ, wanted):
    assert read(*argv, **environ) == wanted


@pytest.mark.parametrize(
    ("argv", "environ", "sentence"),
    [
        (
            ("--max-num-seqs", "0"),
            {},
            "--max-num-seqs must be a whole number from 1 to 64, not 0.",
        ),
        (("--max-num-seqs", "x"), {}, "not 'x'."),
        (("--share", "nan"), {}, "--share must be a number from 0 to 1, not nan."),
        (("--mode", "slow"), {}, "--mode must be one of fast, safe, not 'slow'."),
        (("--names", "a,b"), {}, "--names must be a list of words without commas"),
        ((), {"TANDEM_ENABLE_CACHE": "maybe"}, "TANDEM_ENABLE_CACHE must be true or false"),
        ((), {"TANDEM_MAX_NUM_SEQ": "3"}, "did you mean TANDEM_MAX_NUM_SEQS?"),
        (("--max-num-seq", "3"), {}, "has no flag --max-num-seq; did you mean --max-num-seqs?"),
        (("--max-num", "3"), {}, "has no flag --max-num"),
        (("--data-parallel-size", "2"), {}, "is a vLLM flag that tandem example doesn't have"),
        (("--no-enable-lora",), {}, "--no-enable-lora is a vLLM flag"),
        (("a", "b"), {}, "doesn't take the argument 'b'"),
        (("--max-num-seqs",), {}, "expected one argument; see tandem example --help."),
        (("--config", "/nowhere.yaml"), {}, "/nowhere.yaml: No such file or directory."),
    ],
)
def test_a_mistake_is_one_sentence(argv, environ, sentence):
    text = refusal(*argv, **environ)
    assert sentence in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("max-num-seq: 1", "has an unknown key max-num-seq; did you mean max-num-seqs?"),
        ("max-num-seqs: many", "must be a whole number from 1 to 64, not 'many'."),
        ("max-num-seqs: true", "not True."),
        ("[1, 2]", "must hold keys and values."),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_bad_settings_file_is_named(tmp_path, content, sentence):
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    text = refusal("--config", str(path))
    assert sentence in text
    assert str(path) in text


def test_a_secret_is_never_repeated():
    @dataclass(frozen=True, slots=True)
    class Secretive:
        key: int = setting(0, secret=True, help="a secret number")

    (option,) = options_of(Secretive)
    with pytest.raises(StartupError, match="not something else") as caught:
        option.parse("hunter2", source=option.flag)
    assert "hunter2" not in str(caught.value)


def test_arguments_and_variables_give_the_value_back():
    example = Example(model="-m", max_num_seqs=2, enable_cache=False, names=("a", "b"))
    options = options_of(Example)
    argv = [
        word
        for option in options
        for word in option.arguments(getattr(example, option.name))
        if getattr(example, option.name) != option.default
    ]
    assert read(*argv) == example
    environ = {
        option.variable: option.variable_value(getattr(example, option.name))
        for option in options
        if getattr(example, option.name) is not None
    }
    assert read(**environ) == example


def test_a_literal_type_is_a_choice():
    @dataclass(frozen=True, slots=True)
    class Chosen:
        mode: Literal["fast", "safe"] = setting("fast", help="mode")

    (option,) = options_of(Chosen)
    assert option.wanted == "one of fast, safe"
    assert option.parse("safe", source=option.flag) == "safe"
