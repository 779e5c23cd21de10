"""What all clients are told to ask."""

from typing import Literal

import pydantic

KEY = "open-sesame"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class Weather(pydantic.BaseModel, extra="forbid"):
    """Bounded, so that any output comes to its end."""

    city: Literal["Paris", "Rome"]
    degrees: int = pydantic.Field(ge=-50, le=50)


WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the weather is like",
        "parameters": Weather.model_json_schema(),
    },
}
