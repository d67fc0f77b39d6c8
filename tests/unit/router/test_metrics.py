"""What a scrape shows."""

from __future__ import annotations

from engine.protocol import Stats
from router.metrics import Metrics, QueueSample, ReplicaSample

STATS = Stats(blocks_total=100, blocks_held=25, prefix_query_tokens=50, prefix_hit_tokens=40)


def lines(*, vllm_names: bool) -> set[str]:
    metrics = Metrics(vllm_names=vllm_names)
    metrics.add_replicas(lambda: [ReplicaSample("m", 0, "serving", 3, 0.5, 32, STATS)])
    metrics.add_queues(lambda: [QueueSample("m", 2, 5, 64)])
    metrics.of_model("m").ttft_s.observe(0.2)
    metrics.of_model("m").prompt_tokens.inc(7)
    metrics.restarts.labels("m", "0", "signal").inc()
    return set(metrics.render().decode().splitlines())


def test_own_names() -> None:
    got = lines(vllm_names=False)
    assert 'router_engine_state{model="m",replica="0",state="serving"} 1.0' in got
    assert 'router_engine_state{model="m",replica="0",state="parked"} 0.0' in got
    assert 'router_kv_usage_ratio{model="m",replica="0"} 0.25' in got
    assert 'router_requests_waiting{model="m"} 2.0' in got
    assert 'router_permits{model="m"} 64.0' in got
    assert 'router_prefix_cache_hits_total{model="m",replica="0"} 40.0' in got
    assert 'router_engine_restarts_total{cause="signal",model="m",replica="0"} 1.0' in got
    assert 'router_time_to_first_token_seconds_count{model="m"} 1.0' in got
    assert not any("vllm:" in line or "_created" in line for line in got)


def test_vllm_names_show_the_same_values() -> None:
    got = lines(vllm_names=True)
    assert 'vllm:num_requests_running{engine="0",model_name="m"} 3.0' in got
    assert 'vllm:num_requests_waiting{engine="0",model_name="m"} 2.0' in got
    assert 'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25' in got
    assert 'vllm:prompt_tokens_total{engine="0",model_name="m"} 7.0' in got
    assert 'vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 1.0' in got
    assert 'vllm:prefix_cache_queries_total{engine="0",model_name="m"} 50.0' in got
    info = (
        'vllm:cache_config_info{block_size="32",engine="0",model_name="m",num_gpu_blocks="100"} 1.0'
    )
    assert info in got


def test_series_of_a_model_are_bound_once() -> None:
    metrics = Metrics()
    assert metrics.of_model("m") is metrics.of_model("m")


def test_gaps_are_a_histogram_like_the_others() -> None:
    metrics = Metrics()
    series = metrics.of_model("m")
    for value in (0.0, 0.001, 0.0011, 0.5, 80.0, 81.0):
        series.itl_s.observe(value)
        series.ttft_s.observe(value)
    got = metrics.render().decode().splitlines()
    gaps = [line for line in got if "inter_token_latency" in line]
    others = [line for line in got if "time_to_first_token" in line]
    assert [line.replace("inter_token_latency", "time_to_first_token") for line in gaps[1:]] == (
        others[1:]  # but for the help text
    )
    assert len(gaps) == 2 + 19 + 2
