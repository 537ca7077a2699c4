"""The metrics for Prometheus."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from serving import Served

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"


def values(server: Served) -> dict[str, float]:
    """Every sample by its name and labels, as Prometheus's own parser reads them."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    return {f"{s.name}{sorted(s.labels.items())}": s.value for f in families for s in f.samples}


def grown(server: Served, act) -> dict[str, float]:
    before = values(server)
    act()
    return {k: v - before.get(k, 0) for k, v in values(server).items() if v != before.get(k, 0)}


def test_a_reply_is_counted_with_its_tokens_and_their_times(server):
    body = {"messages": HELLO, "max_tokens": 6, "logit_bias": {"2": -100}, "n": 2}
    totals = grown(server, lambda: server.post(CHAT, body))
    prompt = len(server.model.prompt_ids(HELLO))
    assert totals["steer_requests_total[('route', '/v1/chat/completions'), ('status', '200')]"] == 1
    assert totals["steer_prompt_tokens_total[]"] == prompt
    assert totals["steer_completion_tokens_total[]"] == 12
    assert totals["steer_time_to_first_token_seconds_count[]"] == 2
    assert totals["steer_time_per_token_seconds_count[]"] == 10
    assert totals["steer_time_per_token_seconds_sum[]"] > 0
    assert "steer_hung_up_total[]" not in totals


def test_requests_are_counted_by_route_and_status_and_no_path_makes_a_new_series(server):
    def act() -> None:
        server.post(CHAT, {})
        for n in range(5):
            server.get(f"/nowhere/{n}")
            server.get(f"/v1/models/unknown{n}")

    totals = {k: v for k, v in grown(server, act).items() if k.startswith("steer_requests_total")}
    assert totals == {
        "steer_requests_total[('route', '/metrics'), ('status', '200')]": 1,
        "steer_requests_total[('route', '/v1/chat/completions'), ('status', '400')]": 1,
        "steer_requests_total[('route', 'other'), ('status', '404')]": 5,
        "steer_requests_total[('route', '/v1/models/{name:path}'), ('status', '404')]": 5,
    }


def test_running_and_waiting_replies_are_counted(server):
    totals = values(server)
    assert totals["steer_jobs_running[]"] == totals["steer_jobs_waiting[]"] == 0
