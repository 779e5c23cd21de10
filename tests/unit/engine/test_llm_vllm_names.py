"""`LLM` takes what scripts for vLLM give it: prompts, sampling fields, options of chats."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import write_tiny_llama

from engine import LLM, BeamSearchParams, SamplingParams, TokensPrompt
from engine.prompts import Prompt
from engine.tokenizer import Tokenizer
from protocol.errors import InvalidRequestError, StartupError
from protocol.sampling import ThoughtLimit

PROMPT = "Once upon a time there was a fox"
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> LLM:
    return LLM(
        str(model_dir),
        load_format="dummy",
        dtype="float32",
        num_threads=1,
        tensor_parallel_size=1,
        trust_remote_code=True,
    )


def sampling(**options: Any) -> SamplingParams:
    return SamplingParams(**({"seed": 5, "max_tokens": 20, "ignore_eos": True} | options))


def text(llm: LLM, **options: Any) -> str:
    return llm.generate(PROMPT, sampling(**options), use_tqdm=False)[0].outputs[0].text


def test_prompts_come_in_four_forms(llm: LLM) -> None:
    token_ids = llm.get_tokenizer().encode(PROMPT)
    forms: list[Prompt] = [PROMPT, {"prompt": PROMPT}, token_ids, {"prompt_token_ids": token_ids}]
    together = llm.generate(forms, sampling(), use_tqdm=False)
    assert [output.prompt_token_ids for output in together] == [token_ids] * 4
    assert [output.prompt for output in together] == [PROMPT, PROMPT, None, None]
    assert all(output.finished for output in together)
    for form in forms:
        (alone,) = llm.generate(form, sampling(), use_tqdm=False)
        assert alone.prompt_token_ids == token_ids
    with pytest.raises(InvalidRequestError, match="`prompt`"):
        llm.generate({"text": PROMPT}, use_tqdm=False)  # pyright: ignore[reportArgumentType]


def test_stop_may_be_one_string_or_nothing(llm: LLM) -> None:
    full = text(llm)
    stop = full[10:14]
    assert text(llm, stop=stop) == text(llm, stop=[stop]) == full[: full.index(stop)]
    assert text(llm, stop=None, stop_token_ids=None) == full


def test_bad_words_are_not_written(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    (output,) = llm.generate(PROMPT, sampling(temperature=0), use_tqdm=False)
    word = tokenizer.decode(output.outputs[0].token_ids[:1])
    (held,) = llm.generate(PROMPT, sampling(temperature=0, bad_words=[word]), use_tqdm=False)
    assert output.outputs[0].token_ids[0] not in held.outputs[0].token_ids
    with pytest.raises(InvalidRequestError, match="`bad_words`"):
        text(llm, bad_words=[""])


def test_without_detokenizing_there_are_tokens_only(llm: LLM) -> None:
    (full,) = llm.generate(PROMPT, sampling(), use_tqdm=False)
    (bare,) = llm.generate(
        PROMPT, sampling(detokenize=False, spaces_between_special_tokens=False), use_tqdm=False
    )
    assert bare.outputs[0].token_ids == full.outputs[0].token_ids
    assert bare.outputs[0].text == ""
    with pytest.raises(InvalidRequestError, match="`detokenize`"):
        text(llm, detokenize=False, stop="a")


def test_thoughts_are_limited_where_their_marks_are_tokens(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequestError, match="`thinking_token_budget`"):
        text(llm, thinking_token_budget=3)
    marks: Mapping[str, list[int]] = {"<think>": [3], "</think>": [4]}

    def encode(self: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        return marks[text]

    monkeypatch.setattr(Tokenizer, "encode", encode)
    held = sampling(thinking_token_budget=3).for_tokenizer(llm.tokenizer)
    assert held.thoughts == ThoughtLimit(max_tokens=3, opening_token_id=3, closing_token_id=4)


def test_a_chat_takes_a_template_and_names_for_it(llm: LLM) -> None:
    (output,) = llm.chat(
        MESSAGES,
        sampling(),
        use_tqdm=False,
        chat_template="{{ greeting }} {{ messages[0].content }}",
        chat_template_kwargs={"greeting": "Oh,"},
    )
    assert llm.tokenizer.decode(output.prompt_token_ids) == "Oh, Hello"


def test_beams_take_a_temperature_and_any_prompt(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    warm = BeamSearchParams(beam_width=2, max_tokens=3, temperature=1.0)
    assert llm.beam_search([{"prompt": PROMPT}], params) == llm.beam_search(PROMPT, warm)


def test_the_prefix_cache_can_be_forgotten(llm: LLM) -> None:
    prompt: TokensPrompt = {"prompt_token_ids": list(range(200, 250))}
    llm.generate(prompt, sampling(), use_tqdm=False)
    assert llm.generate(prompt, sampling(), use_tqdm=False)[0].num_cached_tokens == 48
    assert llm.reset_prefix_cache()
    assert llm.generate(prompt, sampling(), use_tqdm=False)[0].num_cached_tokens == 0


def test_without_sampling_params_the_models_own_are_used(model_dir: Path, tmp_path: Path) -> None:
    for file in model_dir.iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.25, "top_k": 7}')
    llm = LLM(str(tmp_path), load_format="dummy", dtype="float32", num_threads=1, seed=3)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.25, top_k=7)
    (output,) = llm.generate(PROMPT, use_tqdm=False)
    same = LLM(str(tmp_path), load_format="dummy", dtype="float32", num_threads=1, seed=3)
    (asked,) = same.generate(PROMPT, SamplingParams(temperature=0.25, top_k=7), use_tqdm=False)
    assert output.outputs == asked.outputs


def test_settings_that_are_not_there_are_named(model_dir: Path) -> None:
    with pytest.raises(StartupError, match="tensor_parallel_size can't be 2"):
        LLM(str(model_dir), tensor_parallel_size=2)
    with pytest.raises(StartupError, match="no setting max_modle_len, only"):
        LLM(str(model_dir), max_modle_len=5)


@pytest.mark.parametrize(
    ("option", "must_be"),
    [
        ({"attention_backend": "flash_attn"}, "one of auto, native, flash-attn"),
        ({"kv_cache_dtype": "nvfp4"}, "one of auto, bfloat16"),
        ({"dtype": None}, "one of auto, bfloat16"),
        ({"block_size": 0}, "from 1 to 256"),
        ({"max_num_seqs": "many"}, "1 or more"),
        ({"gpu_memory_utilization": float("nan")}, "from 0"),
        ({"quantization_ignore": "lm_head"}, "a list"),
    ],
)
def test_values_out_of_bounds_are_named(
    model_dir: Path, option: dict[str, object], must_be: str
) -> None:
    ((name, value),) = option.items()
    with pytest.raises(StartupError, match=f"{name} is {value!r}, but must be {must_be}"):
        LLM(str(model_dir), **option)
