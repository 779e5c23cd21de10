"""Jumps over forced tokens: where a grammar leaves no choice, nothing is sampled.

1. A step's tokens are on the host and the matchers have accepted them. `extend` asks for the
   tokens that must follow each, and puts them behind where that pays (scheduler/jump_rule.py).
2. All are committed as if they had been sampled one by one: lengths, ends and stops hold.
3. The next step computes what is known of each sequence as one chunk, like a prompt's, and samples
   behind it. If that step runs already (adr/0008), with the sequence's last token alone, what it
   would sample is known: it doesn't, and the chunk follows in the step behind it.

A mask would hold each of these tokens alone, and random numbers belong to positions, so outputs are
the same at any temperature. Where more than a grammar has a say, or somebody asked for
log-probabilities, nobody jumps (`Constraint.forced_tokens`).
"""

import dataclasses

from engine.engine import Engine
from engine.pipeline import FinishedStep
from engine.sampler.sampled import SampledToken
from engine.scheduler.decode import DecodeScheduler
from engine.scheduler.jump_rule import jumps_pay


class JumpAhead:
    """The jumps of one engine's sequences."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def extend(
        self, sampled: list[SampledToken], *, num_running: int, is_ahead: bool, loses_graph: bool
    ) -> list[SampledToken]:
        """A step's tokens, before they're committed, with those that are forced by them.

        `num_running` sequences share the next step; `is_ahead` if it's launched already, and
        `loses_graph` if the step that computes the chunks could else be a decode step's graph.
        """
        if not self._engine.jumps_ahead:
            return sampled
        forced = self._engine.forced_tokens([token.sequence for token in sampled])
        jumps = {each: tokens for each, tokens in forced.items() if len(tokens) > is_ahead}
        spared = [len(tokens) - is_ahead for tokens in jumps.values()]
        if not jumps_pay(
            spared,
            num_running=num_running,
            loses_graph=loses_graph,
            max_captured=self._engine.max_captured_chunks,
        ):
            return sampled
        for sequence, tokens in jumps.items():
            self._engine.append(sequence, tokens)
        return [
            dataclasses.replace(token, forced_token_ids=jumps[token.sequence])
            if token.sequence in jumps
            else token
            for token in sampled
        ]


class DecodeJumps:
    """The jumps of what a decode scheduler's pipeline has run."""

    def __init__(self, engine: Engine, scheduler: DecodeScheduler) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._jumps = JumpAhead(engine)

    def extend(self, finished: FinishedStep) -> list[SampledToken]:
        """Its tokens, before they're committed, with those that are forced by them."""
        is_mixed = self._scheduler.computes_prompts_behind(finished.plan)
        return self._jumps.extend(
            finished.sampled,
            num_running=self._scheduler.num_running,
            is_ahead=finished.is_followed,
            loses_graph=self._engine.uses_graphs and not is_mixed,
        )
