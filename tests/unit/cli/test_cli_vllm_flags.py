"""A vLLM command line runs, or is refused with a sentence that says what to do."""

import pytest

from cli.declarations import SERVE
from cli.resolve import Settings, resolve
from engine.config import EngineConfig
from protocol.errors import StartupError

# Each flag of vLLM's usual command lines, with a value that runs here.
ACCEPTED = """
--model some/model
--tensor-parallel-size 1
--pipeline-parallel-size 1
--max-model-len 2048
--max-num-seqs 64
--max-num-batched-tokens 4096
--gpu-memory-utilization 0.85
--swap-space 0
--swap-space 4
--kv-cache-dtype auto
--quantization fp8
--quantization compressed-tensors
--kv-cache-dtype fp8
--kv-cache-dtype fp8_e4m3
--kv-cache-dtype fp8_e5m2
--enable-prefix-caching
--no-enable-prefix-caching
--enable-chunked-prefill
--num-scheduler-steps 1
--max-loras 1
--max-lora-rank 16
--disable-log-requests
--attention-backend FLASH_ATTN
--attention-backend TRITON_ATTN
--guided-decoding-backend guidance
--guided-decoding-backend llguidance
--guided-decoding-backend xgrammar
--guided-decoding-backend outlines
--guided-decoding-backend auto
--enforce-eager
--distributed-executor-backend mp
--block-size 32
--preemption-mode recompute
--preemption-mode swap
--served-model-name one two
--api-key secret
--enable-auto-tool-choice
--tool-call-parser hermes
--reasoning-parser deepseek_r1
--dtype bfloat16
--seed 7
--host 0.0.0.0
--port 9000
--chat-template file.jinja
--load-format dummy
--num-gpu-blocks-override 100
-tp 1 -pp 1
-q fp8
--max_model_len 2048
--max_model_len=2048 --no_enable_prefix_caching
--enable-chunked-prefill True
--enable-chunked-prefill=true
--dtype half
--dtype float
"""

REFUSED = {
    "--tensor-parallel-size 2": "--prefill-workers and --decode-workers",
    "--pipeline-parallel-size 2": "--prefill-workers and --decode-workers",
    "--swap-space -1": "0 or more",
    "--quantization awq": "one of fp8, compressed-tensors",
    "--kv-cache-dtype nvfp4": "one of auto, bfloat16, float16, fp8, fp8_e4m3, fp8_e5m2",
    "--attention-backend FLASHINFER": "one of auto, native, flash-attn, TRITON_ATTN, FLASH_ATTN",
    "--no-enable-chunked-prefill": "--max-num-batched-tokens says how large",
    "--num-scheduler-steps 8": "the next step is prepared while one runs",
    "--speculative-model draft": "leave it out",
    "--num-speculative-tokens 5": "leave it out",
    "--enable-lora": "merge the adapter",
    "--max-loras 4": "merge the adapter",
    "--max-lora-rank 64": "merge the adapter",
    '--rope-scaling {"rope_type":"yarn"}': "config.json",
    "--guided-decoding-backend lm-format-enforcer": "one of auto, guidance, llguidance, xgrammar",
    "--distributed-executor-backend ray": "one of mp, uni",
    "--preemption-mode drop": "one of recompute, swap",
    '--limit-mm-per-prompt {"image":1}': "text only",
    "--data-parallel-size 2": "doesn't have: --prefill-workers and --decode-workers",
    "-tp 2": "--prefill-workers and --decode-workers",
    "--enable-chunked-prefill False": "--max-num-batched-tokens says how large",
    "--enforce-eager=maybe": "true or false",
    "--trust-remote-code": "never run; leave it out",
    "--structured-outputs-config.backend xgrammar": "it's --guided-decoding-backend here",
    "--uvicorn-log-level info": "it's --log-level here",
    "--task generate": "seen by its config.json",
    "--mm-processor-kwargs {}": "leave it out",
    "--use-v2-block-manager": "leave it out",
    "--max-model-len 4.5": "a whole number",
    "--max-model-len 0.3K": "a whole number",
    "--max-model-len k": "a whole number",
}


def serve(line: str) -> Settings:
    return resolve(SERVE, line.split(), environ={})


@pytest.mark.parametrize("line", ACCEPTED.strip().splitlines())
def test_what_runs(line: str) -> None:
    assert serve(line).config(EngineConfig) is not None


@pytest.mark.parametrize(
    ("name", "uses_it"),
    [
        ("auto", False),
        ("native", False),
        ("TRITON_ATTN", False),
        ("flash-attn", True),
        ("FLASH_ATTN", True),
    ],
)
def test_attention_by_vllm_names(name: str, *, uses_it: bool) -> None:
    config = serve(f"--attention-backend {name}").config(EngineConfig)
    assert config.uses_flash_attention == uses_it
    assert not serve("").config(EngineConfig).uses_flash_attention


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused(line: str) -> None:
    with pytest.raises(StartupError) as caught:
        serve(line)
    text = str(caught.value)
    flag = line.split()[0].split("=")[0].replace("--no-", "--")
    assert {"-tp": "--tensor-parallel-size"}.get(flag, flag) in text
    assert REFUSED[line] in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "number"), [("4k", 4_000), ("4K", 4_096), ("1.5K", 1_536), ("0.002m", 2_000)]
)
def test_lengths_may_be_written_as_people_do(tmp_path, text: str, number: int) -> None:
    assert serve(f"--max-model-len {text}").config(EngineConfig).max_model_len == number
    file = tmp_path / "settings.yaml"
    file.write_text(f"max_model_len: {text}\n")
    settings = resolve(SERVE, ["--config", str(file)], environ={})
    assert settings.config(EngineConfig).max_model_len == number


def test_a_switch_with_a_value_is_no_model() -> None:
    config = serve("--enable-prefix-caching False --enforce-eager true a/model").config(
        EngineConfig
    )
    assert (config.model, config.enable_prefix_caching, config.enforce_eager) == (
        *("a/model", False),
        True,
    )


def test_a_file_of_vllm_is_told_what_to_do(tmp_path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("trust-remote-code: true\n")
    with pytest.raises(StartupError, match=r"vLLM's key trust-remote-code, .* leave it out"):
        resolve(SERVE, ["--config", str(file)], environ={})


def test_variables_and_files_are_held_to_the_same(tmp_path) -> None:
    with pytest.raises(StartupError, match="TANDEM_TENSOR_PARALLEL_SIZE can't be 4: a worker"):
        resolve(SERVE, [], environ={"TANDEM_TENSOR_PARALLEL_SIZE": "4"})
    file = tmp_path / "settings.yaml"
    file.write_text("tensor-parallel-size: 1\nenable-lora: true\n")
    with pytest.raises(StartupError, match=r"enable-lora in .* can't be True: adapters"):
        resolve(SERVE, ["--config", str(file)], environ={})
