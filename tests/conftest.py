"""Shared fixtures: tiny random models and a byte tokenizer, so that the fast tests need no download."""

import os

import pytest
from hypothesis import settings

from tests.tiny import tiny_model

# The same examples in every run, so that a red run means a change; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session", params=["llama", "qwen2", "gpt2"])
def any_model(request):
    """A tiny random model of each kind: grouped heads, rotary and learned positions."""
    return tiny_model(request.param)
