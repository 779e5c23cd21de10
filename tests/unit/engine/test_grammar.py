"""Grammars over the built-in model's vocabulary, and the sampler that follows them."""

import ctypes
import json

import numpy as np
import pytest
import torch

from engine.grammar import GrammarCompiler, GrammarMatcher, check_grammar, make_compiler
from engine.sampler.sampler import Sampler
from engine.sequence import Sequence
from engine.tokenizer import Tokenizer
from engine.weights.model_dir import resolve_model
from protocol.errors import InvalidRequestError
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams
from protocol.structured_outputs import StructuredOutputsParams

EOS, VOCAB_SIZE = 2, 49152


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(resolve_model(None, progress=False))


@pytest.fixture(scope="module", params=["llguidance", "xgrammar", "outlines"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def compiler(backend: str) -> GrammarCompiler:
    return compiler_of(backend)


def compiler_of(backend: str, eos_token_ids: tuple[int, ...] = (EOS,)) -> GrammarCompiler:
    file = resolve_model(None, progress=False) / "tokenizer.json"
    return make_compiler(backend, file, vocab_size=VOCAB_SIZE, eos_token_ids=eos_token_ids)


def allowed(matcher: GrammarMatcher, compiler: GrammarCompiler) -> set[int]:
    mask = ctypes.create_string_buffer(compiler.mask_bytes)
    matcher.write_allowed(ctypes.addressof(mask), compiler.mask_bytes)
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
    return set(bits.nonzero()[0].tolist())


def test_exactly_the_prefixes_of_what_may_come_are_allowed(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    choices = ("left", "lemon")
    matcher = compiler.matcher(StructuredOutputsParams(choice=choices))
    pieces = {i: tokenizer.token_bytes(i).decode(errors="replace") for i in range(17, VOCAB_SIZE)}
    expected = {
        i for i, text in pieces.items() if text and any(c.startswith(text) for c in choices)
    }
    assert allowed(matcher, compiler) == expected
    assert matcher.accept(tokenizer.encode("le")[0])
    assert not matcher.accept(tokenizer.encode("x")[0])
    assert matcher.is_over
    assert matcher.error


def test_matchers_of_one_grammar_do_not_share_their_state(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    params = StructuredOutputsParams(regex="ab|b")
    first, second = compiler.matcher(params), compiler.matcher(params)
    assert first.accept(tokenizer.encode("b")[0])
    assert allowed(first, compiler) == {EOS}
    assert second.accept(tokenizer.encode("a")[0])
    assert allowed(second, compiler) == set(tokenizer.encode("b"))


BROKEN = [
    StructuredOutputsParams(regex="("),
    StructuredOutputsParams(json="{"),
    StructuredOutputsParams(json={"type": "nothing"}),
    StructuredOutputsParams(grammar="start: nowhere"),
]


@pytest.mark.parametrize("params", BROKEN, ids=str)
def test_what_cannot_be_compiled_is_refused(
    compiler: GrammarCompiler, params: StructuredOutputsParams
) -> None:
    with pytest.raises(InvalidRequestError, match="`guided`") as refusal:
        check_grammar(compiler, params, "guided")
    assert refusal.value.field == "guided"


def sequence(params: StructuredOutputsParams, outputs: list[int], **sampling: object) -> Sequence:
    request = Request(
        key=RequestKey("r", 1),
        token_ids=[5, 6, *outputs],
        num_prompt_tokens=2,
        sampling=SamplingParams(temperature=0.0, structured_outputs=params, **sampling),
    )
    return Sequence(request=request, root=b"", arrival_s=0.0)


@pytest.fixture
def sampler(compiler: GrammarCompiler) -> Sampler:
    return sampler_with(compiler)


def sampler_with(compiler: GrammarCompiler) -> Sampler:
    return Sampler(
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(EOS,),
        root_seed=0,
        device=torch.device("cpu"),
        grammars=compiler,
    )


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (StructuredOutputsParams(regex="("), "unclosed group"),
        (StructuredOutputsParams(json={"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (StructuredOutputsParams(json={"$ref": "#"}), "no output can obey it"),
        (StructuredOutputsParams(grammar="start: nowhere"), "nowhere"),
    ],
)
def test_a_refusal_says_why_in_one_line(params: StructuredOutputsParams, reason: str) -> None:
    error = compiler_of("llguidance").error_of(params)
    assert reason in error
    assert "\n" not in error


def test_a_sequence_that_comes_with_outputs_goes_on_behind_them(
    sampler: Sampler, tokenizer: Tokenizer
) -> None:
    """As after a transfer or a preemption."""
    params = StructuredOutputsParams(choice=("no", "no way"))
    sampler.add(0, sequence(params, tokenizer.encode("no")))
    sampler.add(1, sequence(params, tokenizer.encode("no")))
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, tokenizer.encode("x")[0]] = 9.0
    logits[0, EOS] = 5.0
    logits[1, tokenizer.encode(" way")[0]] = 5.0
    sampled = sampler.choose(logits, np.array([0, 1]), np.array([1, 1])).read()
    assert sampled.token_ids[0] == EOS
    assert tokenizer.decode(sampled.token_ids[1:]) == " way"


@pytest.mark.parametrize("params", BROKEN, ids=str)
def test_what_does_not_compile_ends_its_own_output_only(
    sampler: Sampler, params: StructuredOutputsParams
) -> None:
    sampler.add(0, sequence(params, [], min_tokens=5))
    sampler.add(1, sequence(StructuredOutputsParams(regex="[a-z]+"), []))
    logits = torch.zeros(2, VOCAB_SIZE)
    sampled = sampler.choose(logits, np.array([0, 1]), np.array([0, 0])).read()
    assert sampled.token_ids[0] == EOS
    assert sampled.token_ids[1] != EOS
    [(place, failure)] = sampled.failures.items()
    assert (place, failure.field) == (0, None), "it's this worker that can't"
    assert "doesn't compile here" in failure.message


# Its first token is fine; behind that, there are too many ways to go on.
TOO_COMPLEX = StructuredOutputsParams(choice=tuple(f"x{number}" for number in range(20_000)))


def test_a_grammar_that_becomes_too_complex_fails_its_own_output_only(tokenizer: Tokenizer) -> None:
    """llguidance says so; the others are through with all of it when they have compiled it."""
    compiler = compiler_of("llguidance")
    sampler = sampler_with(compiler)
    check_grammar(compiler, TOO_COMPLEX, "choice")
    sampler.add(0, sequence(TOO_COMPLEX, []))
    sampler.add(1, sequence(StructuredOutputsParams(regex="[a-z]+"), []))
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, tokenizer.encode("x")[0]] = 9.0
    rows = np.array([0, 1])
    first = sampler.choose(logits, rows, np.array([0, 0])).read()
    assert tokenizer.decode(first.token_ids) == "xx"
    assert not first.failures, "it may have been the last token"
    second = sampler.choose(logits, rows, np.array([1, 1])).read()
    [(place, failure)] = second.failures.items()
    assert (place, failure.field) == (0, "structured_outputs")
    assert "`structured_outputs` can't be followed any further: " in failure.message
    assert "\n" not in failure.message
    assert tokenizer.decode(second.token_ids[1:]) == "x"


def test_a_grammar_without_a_token_that_may_come_fails(
    sampler: Sampler, tokenizer: Tokenizer
) -> None:
    params = StructuredOutputsParams(choice=("left",))
    sampler.add(0, sequence(params, [], allowed_token_ids=tuple(tokenizer.encode("right"))))
    sampled = sampler.choose(torch.zeros(1, VOCAB_SIZE), np.array([0]), np.array([0])).read()
    assert sampled.failures[0].field == "structured_outputs"
    assert "allow none" in sampled.failures[0].message


def test_stop_tokens_that_come_too_early_leave_a_grammar_without_a_token(
    sampler: Sampler, compiler: GrammarCompiler
) -> None:
    stop = tuple(allowed(compiler.matcher(StructuredOutputsParams(choice=("left",))), compiler))
    early = {"stop_token_ids": stop, "min_tokens": 2}
    sampler.add(0, sequence(StructuredOutputsParams(choice=("left",)), [], **early))
    sampler.add(1, sequence(StructuredOutputsParams(choice=("left", "right")), [], **early))
    sampled = sampler.choose(torch.zeros(2, VOCAB_SIZE), np.array([0, 1]), np.array([0, 0])).read()
    assert {place: failure.field for place, failure in sampled.failures.items()} == {
        0: "structured_outputs"
    }
    assert sampled.token_ids[1] not in (EOS, *stop)


def test_outputs_that_do_not_obey_are_the_workers_fault(
    sampler: Sampler, tokenizer: Tokenizer
) -> None:
    sampler.add(0, sequence(StructuredOutputsParams(choice=("left",)), tokenizer.encode("right")))
    sampled = sampler.choose(torch.zeros(1, VOCAB_SIZE), np.array([0]), np.array([1])).read()
    assert sampled.failures[0].field is None


def test_the_end_of_a_grammar_is_no_failure(sampler: Sampler, tokenizer: Tokenizer) -> None:
    params = StructuredOutputsParams(choice=("left",))
    sampler.add(0, sequence(params, tokenizer.encode("left"), min_tokens=9))
    # More could follow here, but only what isn't allowed.
    more, letters = StructuredOutputsParams(regex="[a-z]+"), tuple(tokenizer.encode("1"))
    outputs = tokenizer.encode("left")
    sampler.add(1, sequence(more, outputs, allowed_token_ids=letters, ignore_eos=True))
    sampled = sampler.choose(torch.zeros(2, VOCAB_SIZE), np.array([0, 1]), np.array([1, 1])).read()
    assert (sampled.token_ids, dict(sampled.failures)) == ([EOS, EOS], {})


def test_a_row_is_free_again_when_its_sequence_is_gone(sampler: Sampler) -> None:
    sampler.add(0, sequence(StructuredOutputsParams(choice=("no",)), []))
    sampler.remove(0)
    request = Request(
        key=RequestKey("free", 1),
        token_ids=[5, 6],
        num_prompt_tokens=2,
        sampling=SamplingParams(temperature=0.0),
    )
    sampler.add(0, Sequence(request=request, root=b"", arrival_s=0.0))
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 4242] = 1.0
    assert sampler.choose(logits, np.array([0]), np.array([0])).read().token_ids == [4242]


def test_forced_tokens_are_what_masks_hold_alone(
    compiler: GrammarCompiler, tokenizer: Tokenizer, backend: str
) -> None:
    fields = {"customer_number": {"type": "boolean"}, "is_new": {"enum": [1, 2]}}
    schema = {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }
    matcher = compiler.matcher(StructuredOutputsParams(json=schema))
    token_ids: list[int] = []
    num_forced = 0
    while not matcher.is_over:
        forced = matcher.forced_tokens()
        num_forced += len(forced)
        for token_id in forced:
            assert allowed(matcher, compiler) == {token_id}
            assert matcher.accept(token_id)
        token_ids += forced
        choices = allowed(matcher, compiler) - {EOS}
        if not choices:
            break
        token_ids.append(min(choices))
        matcher.accept(token_ids[-1])
    assert EOS not in token_ids
    assert json.loads(tokenizer.decode(token_ids)).keys() == fields.keys()
    if backend == "llguidance":
        assert num_forced > len(token_ids) // 2
    else:
        assert num_forced == 0, "these leave open how bytes are spelled"


def test_any_of_several_tokens_ends_an_output(backend: str, tokenizer: Tokenizer) -> None:
    compiler = compiler_of(backend, (EOS, 0))
    for end in (EOS, 0):
        matcher = compiler.matcher(StructuredOutputsParams(regex="ab?"))
        assert not matcher.may_end
        assert matcher.accept(tokenizer.encode("a")[0])
        assert matcher.may_end
        assert allowed(matcher, compiler) == {EOS, 0, *tokenizer.encode("b")}
        assert matcher.accept(end)
        assert matcher.is_over
        assert allowed(matcher, compiler) == {EOS, 0}
        assert not matcher.error


def test_special_tokens_are_no_text(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.matcher(StructuredOutputsParams(regex="[<|>a-z_ ]+"))
    special = tokenizer.pieces.special_ids
    assert len(special) > 9
    assert allowed(matcher, compiler).isdisjoint(special)


@pytest.mark.parametrize("text", ['quo"te', "back\\slash", "new\nline", "日本", "(a|b)*", "ünï 🙂"])
def test_choices_are_taken_by_their_letters(
    compiler: GrammarCompiler, tokenizer: Tokenizer, text: str
) -> None:
    matcher = compiler.matcher(StructuredOutputsParams(choice=(text, "other")))
    for token_id in tokenizer.encode(text):
        assert token_id in allowed(matcher, compiler)
        assert matcher.accept(token_id)
    assert allowed(matcher, compiler) == {EOS}


def test_what_is_prepared_is_compiled_once(compiler: GrammarCompiler) -> None:
    params = StructuredOutputsParams(regex="prepared|refused")
    compiler.prepare(params)
    compiler.prepare(params)
    assert not compiler.matcher(params).error
    broken = StructuredOutputsParams(regex="(")
    compiler.prepare(broken)
    assert compiler.error_of(broken)
