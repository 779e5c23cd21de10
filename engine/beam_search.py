"""Beam search: the likeliest ways to go on, kept side by side, one token at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.outputs import BeamSearchOutput, BeamSearchSequence
from engine.tokenizer import Tokenizer
from protocol.errors import InvalidRequestError
from protocol.request import FinishReason, TokenLogprobs
from protocol.sampling import MAX_LOGPROBS

MAX_BEAM_WIDTH = MAX_LOGPROBS // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """vLLM's names. Beams are ranked by log-probability / output length ** `length_penalty`.

    `temperature` has no effect, as in vLLM: beams are compared by what the model itself says.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    temperature: float = 0.0

    def validate(self) -> None:
        """Raises InvalidRequestError that names the first field out of range."""
        if not 1 <= self.beam_width <= MAX_BEAM_WIDTH:
            raise InvalidRequestError(
                f"`beam_width` must be between 1 and {MAX_BEAM_WIDTH}, got {self.beam_width}.",
                field="beam_width",
            )
        if self.max_tokens < 1:
            raise InvalidRequestError(
                f"`max_tokens` must be at least 1, got {self.max_tokens}.", field="max_tokens"
            )


@dataclass(frozen=True, slots=True)
class Beam:
    """`token_ids` are the prompt's and, behind them, those chosen so far."""

    token_ids: list[int]
    num_prompt_tokens: int
    cum_logprob: float = 0.0
    finish_reason: FinishReason = "length"

    def score(self, length_penalty: float) -> float:
        """The end-of-sequence token counts as part of the output."""
        num_output_tokens = len(self.token_ids) - self.num_prompt_tokens
        return self.cum_logprob / max(1, num_output_tokens) ** length_penalty


def beam_search(
    prompts: Sequence[list[int]],
    params: BeamSearchParams,
    *,
    eos_token_ids: frozenset[int],
    likeliest: Callable[[list[list[int]], int], list[TokenLogprobs]],
) -> list[list[Beam]]:
    """For each prompt the `beam_width` best beams, best first.

    `likeliest(texts, count)` tells the `count` likeliest next tokens behind each text. Twice as
    many as there are beams are looked at, so that enough are left where some end.
    """
    live = [[Beam(prompt, len(prompt))] for prompt in prompts]
    ended: list[list[Beam]] = [[] for _ in prompts]
    for _ in range(params.max_tokens):
        texts = [beam.token_ids for beams in live for beam in beams]
        if not texts:
            break
        nexts = iter(likeliest(texts, 2 * params.beam_width))
        for place, beams in enumerate(live):
            grown = [_grown(beam, *pair) for beam in beams for pair in _pairs(next(nexts))]
            grown.sort(key=lambda beam: -beam.cum_logprob)
            live[place] = []
            for beam in grown[: 2 * params.beam_width]:
                if not params.ignore_eos and beam.token_ids[-1] in eos_token_ids:
                    ended[place].append(
                        Beam(beam.token_ids, beam.num_prompt_tokens, beam.cum_logprob, "stop")
                    )
                elif len(live[place]) < params.beam_width:
                    live[place].append(beam)
    return [
        sorted(beams + others, key=lambda beam: beam.score(params.length_penalty), reverse=True)[
            : params.beam_width
        ]
        for beams, others in zip(ended, live, strict=True)
    ]


def beam_output(beams: Sequence[Beam], tokenizer: Tokenizer) -> BeamSearchOutput:
    """One prompt's beams with their texts."""
    return BeamSearchOutput(
        [
            BeamSearchSequence(
                beam.token_ids,
                tokenizer.decode(beam.token_ids),
                beam.cum_logprob,
                beam.finish_reason,
            )
            for beam in beams
        ]
    )


def _pairs(known: TokenLogprobs) -> list[tuple[int, float]]:
    return list(zip(known.top_token_ids, known.top_logprobs, strict=True))


def _grown(beam: Beam, token_id: int, logprob: float) -> Beam:
    return Beam([*beam.token_ids, token_id], beam.num_prompt_tokens, beam.cum_logprob + logprob)
