"""
The Celery app. Messages carry ids and may be lost, late or doubled: the database decides what they mean.

Every setting that is not Celery's default is here for a reason measured beforehand; the comments name it.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from celery import Celery
from kombu.utils.url import parse_ssl_cert_reqs

from farm.errors import UsageError

#: The one task. Its name is a metric label, so nothing variable belongs in it.
SHARD_TASK = "farm.shard"

_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS = {"ssl_cert_reqs", "ssl_check_hostname", *_TLS_FILES}
#: What a broker's URL may start with, and what its query may say then.
_SCHEMES = {
    "redis": set[str](),
    "rediss": _TLS,
    "sentinel": {"master_name"},
    "redis+socket": {"virtual_host"},
}


def make_app(broker_url: str) -> Celery:
    """
    An app for this broker; no result backend, for rows are the results.

    `UsageError` for a URL that names no broker; it shows nothing of the URL, for a password may be anywhere in it.
    """
    url, tls, master = _read(broker_url)
    app = Celery("farm", include=["tasks.shards"], set_as_current=True)
    app.conf.update(
        broker_url=url,
        broker_use_ssl=tls,
        broker_transport_options={
            **master,
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
        # Acknowledged when taken: what a killed worker held would stay with the broker for a day, and the database
        # knows. Nothing is taken beyond the running shard.
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        task_reject_on_worker_lost=False,  # a poisonous shard must not crash-loop; the database counts
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_pool="threads",
        worker_concurrency=1,
        worker_send_task_events=True,  # none of sending: each command would come as another worker
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


def _read(broker_url: str) -> tuple[str, dict[str, Any] | None, dict[str, str]]:
    """The URL as kombu wants it, what it says of TLS, and the sentinels' word for the server to use."""
    parts = broker_url.split(";")
    read = [_read_one(part) for part in parts]
    schemes = {scheme for _, scheme, _ in read}
    query = {key: value for _, _, each in read for key, value in each.items()}
    if len(read) > 1 and schemes != {"sentinel"}:
        raise _bad("several servers are no broker together; for one that takes over from another use sentinel://")
    if schemes == {"sentinel"} and not query.get("master_name"):
        raise _bad("sentinels need the name of what they watch: add ?master_name=NAME")
    url = ";".join(bare for bare, _, _ in read)
    master = {"master_name": query.pop("master_name")} if "master_name" in query else {}
    if schemes == {"rediss"}:
        query.setdefault("ssl_cert_reqs", "required")
        return f"{url}?{urlencode(query)}", _tls(query), master
    return broker_url if schemes == {"redis+socket"} else url, None, master


def _read_one(url: str) -> tuple[str, str, dict[str, str]]:
    """One server's URL without its query, its scheme and the query."""
    try:
        parts = urlsplit(url)
        port, query = parts.port, dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError:  # its text may hold a password
        raise _bad("it is no URL of the form redis://USER:PASSWORD@HOST:PORT/0") from None
    if parts.scheme not in _SCHEMES:
        raise _bad(f"it starts with none of {', '.join(f'{scheme}://' for scheme in _SCHEMES)}")
    if parts.fragment or not query.keys() <= _SCHEMES[parts.scheme]:
        allowed = ", ".join(sorted(_SCHEMES[parts.scheme])) or "nothing"
        raise _bad(f"of what can follow ? and #, {parts.scheme}:// knows {allowed}")
    if parts.scheme == "redis+socket":
        if not parts.path.strip("/") or parts.hostname:
            raise _bad("it names no socket: redis+socket:///PATH/OF/THE/SOCKET")
    elif not parts.hostname or port == 0:
        raise _bad("it names no host")
    elif not (database := parts.path.strip("/")).isdecimal() and database:
        raise _bad("after the host comes the number of a database, usually /0")
    return url.partition("?")[0], parts.scheme, query


def _tls(query: dict[str, str]) -> dict[str, Any]:
    """
    What the URL says of TLS, as redis-py has it: all that Flower's broker page knows. Kombu reads the URL.

    A server's certificate is checked unless the URL says otherwise; kombu by itself would check none.
    """
    tls: dict[str, Any] = dict(query)
    try:
        tls["ssl_cert_reqs"] = parse_ssl_cert_reqs(query["ssl_cert_reqs"])
    except KeyError:
        raise _bad("ssl_cert_reqs is required, optional or none") from None
    if "ssl_check_hostname" in tls:
        tls["ssl_check_hostname"] = tls["ssl_check_hostname"].lower() != "false"
    for name in _TLS_FILES:
        if name in tls and not os.access(tls[name], os.R_OK):
            raise _bad(f"{name} names {tls[name]}, which cannot be read")
    return tls


def _bad(why: str) -> UsageError:
    return UsageError(
        f"FARM_BROKER_URL cannot be used: {why}. (In user names and passwords write % codes for other characters than "
        "letters and digits.)"
    )
