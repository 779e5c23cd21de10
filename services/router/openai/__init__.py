"""Chats and completions, and what other APIs share with them: prompts, sampling, tools, answers."""
