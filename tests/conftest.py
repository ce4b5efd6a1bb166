"""Shared fixtures: tiny random models and a byte tokenizer, so that the fast tests need no download."""

import pytest

from tests.tiny import tiny_model


@pytest.fixture(scope="session", params=["llama", "qwen2", "gpt2"])
def any_model(request):
    """A tiny random model of each kind: grouped heads, rotary and learned positions."""
    return tiny_model(request.param)
