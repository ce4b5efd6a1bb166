"""A broker for the tests of the doors."""

import pytest

from tests.broker import Broker


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    made = Broker(tmp_path_factory.mktemp("broker")).start()
    yield made
    made.stop()
