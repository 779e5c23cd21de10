"""What the parity tests compare with: prompts of all lengths and transformers' own answers."""

from pathlib import Path

import torch
import transformers

LENGTHS = (5, 8, 13, 16, 17, 31, 32, 33, 48, 77, 100, 129, 250, 500, 1000, 3000)
MAX_TOKENS = 16
WORDS = [
    *("the", "river", "city", "of", "old", "light", "under", "a", "green", "hill", "where"),
    *("people", "walk", "and", "sing", "about", "stars", "machines", "numbers", "history"),
    *("water", "bread", "music", "winter", "gold", "seven", "roads", "that", "never", "end"),
    *("because", "someone", "once", "wrote", "every", "answer", "in", "small", "books", "near"),
    *("quiet", "harbours", "said", "Anna", ",", ".", "then"),
]


class GreedyReference:
    """transformers' greedy continuations in float32, each computed once a session."""

    max_tokens = MAX_TOKENS

    def __init__(self, model_dir: Path) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32
        ).eval()
        self._known: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, prompt: list[int]) -> list[int]:
        key = tuple(prompt)
        if key not in self._known:
            ids = torch.tensor([prompt])
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=MAX_TOKENS,
                pad_token_id=0,
            )
            self._known[key] = output[0, len(prompt) :].tolist()
        return self._known[key]

    def prompt_logprobs(self, prompt: list[int]) -> list[float]:
        """Of each token but the first, behind those in front of it."""
        with torch.inference_mode():
            logits = self._model(torch.tensor([prompt])).logits[0, :-1]
        chosen = torch.tensor(prompt[1:]).unsqueeze(-1)
        return logits.log_softmax(-1).gather(-1, chosen).squeeze(-1).tolist()

    def embedding(self, prompt: list[int]) -> list[float]:
        """The last token's state, with length 1."""
        with torch.inference_mode():
            hidden = self._model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        return torch.nn.functional.normalize(hidden, dim=0).tolist()
