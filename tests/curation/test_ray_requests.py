"""Requests by the workers of a real local Ray cluster: the same file as without, and nothing is asked twice."""

import json
import os
import threading

import pytest

from conftest import REPOSITORY, chat
from forgebook.config.curation_blocks import EndpointConfig
from forgebook.config.parse import load_config
from forgebook.curation.endpoint import Endpoint
from forgebook.curation.ray_requests import LARGE, workers_for
from forgebook.curation.synthesize import synthesize
from forgebook.errors import ConfigError, ResourceError
from support_endpoint import endpoint

SEEDS = [chat(f"What is {k} plus {k}?", f"{2 * k}", "Compute.") for k in range(2, 8)]


@pytest.fixture(scope="module")
def ray_session():
    import ray

    ray.shutdown()  # workers of a cluster that another file has started lack this file's key
    yield
    ray.shutdown()


@pytest.fixture
def run(write_rows, tmp_path, monkeypatch):
    def call(url, workers, cache, *settings):
        monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / cache))
        config = load_config(REPOSITORY / "training_configs/tiny/quickstart.yaml", [
            f"train_path={write_rows(SEEDS, 'seeds.jsonl')}", "valid_path=null", "synthesis.teacher.model=teacher",
            f"synthesis.teacher.base_url={url}", f"synthesis.workers={workers}", "synthesis.teacher.retries=0",
            "synthesis.teacher.concurrency=2", "synthesis.teacher.api_key_env=FORGEBOOK_TEST_KEY",
            *(f"synthesis.{one}" for one in settings),
        ])  # fmt: skip
        result = synthesize(config, tmp_path / f"{cache}.jsonl")
        return result, result.out.read_text()

    return call


def test_few_requests_are_sent_from_this_process():
    one = Endpoint(EndpointConfig(model="teacher", base_url="http://127.0.0.1:9/v1"))
    assert workers_for(one, None, LARGE - 1) == 0 and workers_for(one, 0, LARGE) == 0 and workers_for(one, 3, 1) == 3


@pytest.mark.slow
def test_interrupted_on_ray_it_continues_and_writes_the_same_file(run, ray_session, monkeypatch):
    monkeypatch.setenv("FORGEBOOK_TEST_KEY", "sk-of-the-test")
    answered, is_down, one_at_a_time = [], [], threading.Lock()

    def writer(body):
        with one_at_a_time:
            if is_down and len(answered) >= 9:
                return 503
            answered.append(body["seed"])
        k = body["seed"] + 10
        return json.dumps(chat(f"What is {k} plus {k}?", str(2 * k), None)) if k % 3 else "I would rather not."

    with endpoint(writer) as (url, requests):
        _, without_ray = run(url, 0, "here", "count=20")
        answered.clear()
        is_down.append(True)
        with pytest.raises(ResourceError, match="gave no answer, asked 1 times: 503"):
            run(url, 2, "ray", "count=20")
        is_down.clear()
        before = list(answered)
        result, with_ray = run(url, 2, "ray", "count=20")
        assert with_ray == without_ray and result.usage["saved"] == len(before) == 9
        assert len(answered) == len(set(answered))  # nothing twice
        assert {request["key"] for request in requests} == {"Bearer sk-of-the-test"}
        # A wave more than was needed, and not 20 times `count`.
        assert len(answered) <= 30 + 2 * 4 * 2 * 2
    assert os.environ["FORGEBOOK_TEST_KEY"] not in with_ray


@pytest.mark.slow
def test_what_the_endpoint_rejects_is_a_mistake_of_the_config(run, ray_session):
    with (
        endpoint(lambda body: (404, "no such model", {})) as (url, _),
        pytest.raises(ConfigError, match="rejects the request for teacher: 404 no such model"),
    ):
        run(url, 1, "rejected")
