"""What the parity tests compare with: prompts of all lengths and transformers' own answers."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

# The longest is more than a step takes by default.
LENGTHS = (5, 8, 13, 16, 17, 31, 32, 33, 48, 77, 100, 129, 250, 500, 1000, 2100)
MAX_TOKENS = 16
WORDS = [
    *("the", "river", "city", "of", "old", "light", "under", "a", "green", "hill", "where"),
    *("people", "walk", "and", "sing", "about", "stars", "machines", "numbers", "history"),
    *("water", "bread", "music", "winter", "gold", "seven", "roads", "that", "never", "end"),
    *("because", "someone", "once", "wrote", "every", "answer", "in", "small", "books", "near"),
    *("quiet", "harbours", "said", "Anna", ",", ".", "then"),
]


class GreedyReference:
    """transformers' own answers in float32, each computed once a session."""

    max_tokens = MAX_TOKENS

    def __init__(self, model_dir: Path) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32
        ).eval()
        eos = self._model.generation_config.eos_token_id
        self._ends = {eos} if isinstance(eos, int) else set(eos or ())
        self._known: dict[tuple[int, ...], list[int]] = {}
        self._logprobs = functools.cache(self._compute_logprobs)
        self._embedding = functools.cache(self._compute_embedding)

    def __call__(self, prompt: list[int], guess: Sequence[int] = ()) -> list[int]:
        """`guess` makes it quicker if it's right, and no difference if it's wrong."""
        key = tuple(prompt)
        if key not in self._known:
            is_right = self._is_greedy(prompt, guess)
            self._known[key] = list(guess) if is_right else self._generate(prompt)
        return self._known[key]

    def answers(self, prompts: list[list[int]], guesses: list[list[int]]) -> list[list[int]]:
        return [self(prompt, guess) for prompt, guess in zip(prompts, guesses, strict=True)]

    def _is_greedy(self, prompt: list[int], output: Sequence[int]) -> bool:
        """In one pass: whether each token is the likeliest behind all before it, up to the end."""
        if len(output) != MAX_TOKENS or not self._ends.isdisjoint(output[:-1]):
            return False
        ids = torch.tensor([[*prompt, *output[:-1]]])
        with torch.inference_mode():
            logits = self._model(ids, logits_to_keep=len(output)).logits[0]
        return logits.argmax(-1).tolist() == list(output)

    def _generate(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            pad_token_id=0,
        )
        return output[0, len(prompt) :].tolist()

    def prompt_logprobs(self, prompt: list[int]) -> list[float]:
        """Of each token but the first, behind those in front of it."""
        return self._logprobs(tuple(prompt))

    def embedding(self, prompt: list[int]) -> list[float]:
        """The last token's state, with length 1."""
        return self._embedding(tuple(prompt))

    def _compute_logprobs(self, prompt: tuple[int, ...]) -> list[float]:
        with torch.inference_mode():
            logits = self._model(torch.tensor([prompt])).logits[0, :-1]
        chosen = torch.tensor(prompt[1:]).unsqueeze(-1)
        return logits.log_softmax(-1).gather(-1, chosen).squeeze(-1).tolist()

    def _compute_embedding(self, prompt: tuple[int, ...]) -> list[float]:
        with torch.inference_mode():
            hidden = self._model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        return torch.nn.functional.normalize(hidden, dim=0).tolist()
