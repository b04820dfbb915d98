"""
The Celery app. Messages carry ids and may be lost, late or doubled: the database decides what they mean.

Every setting that is not Celery's default is here for a reason measured beforehand; the comments name it.
"""

from __future__ import annotations

from celery import Celery

#: The one task. Its name is a metric label, so nothing variable belongs in it.
SHARD_TASK = "farm.shard"


def make_app(broker_url: str) -> Celery:
    """An app for this broker; no result backend, for rows are the results."""
    app = Celery("farm", include=["tasks.shards"], set_as_current=True)
    app.conf.update(
        broker_url=broker_url,
        broker_transport_options={
            "global_keyprefix": "farm:",
            "visibility_timeout": 86400,  # the database rescues; redelivery within a shard would only be noise
            "socket_keepalive": True,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "health_check_interval": 25,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_serializer="json",
        accept_content=["json"],  # pickle would run whatever reaches the broker
        task_ignore_result=True,
        task_acks_late=True,  # with prefetch 1 nothing is reserved beyond the running shard
        worker_prefetch_multiplier=1,
        task_reject_on_worker_lost=False,  # a poisonous shard must not crash-loop; the database counts
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_pool="threads",
        worker_concurrency=1,
        worker_send_task_events=True,
        task_send_sent_event=True,
        worker_hijack_root_logger=False,
        task_create_missing_queues=True,
        task_publish_retry_policy={"max_retries": 2, "interval_start": 0.1, "interval_step": 0.2, "interval_max": 0.5},
    )
    return app


def queue_of(device: str) -> str:
    """The queue that only this device's worker consumes, e.g. npu.host.3."""
    return "npu." + ".".join(device.rsplit(":", 1))


def worker_name(device: str) -> str:
    """The Celery node name of a device's worker, e.g. npu3@host."""
    host, index = device.rsplit(":", 1)
    return f"npu{index}@{host}"
