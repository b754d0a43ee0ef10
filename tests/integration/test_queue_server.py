from __future__ import annotations

import pathlib
import subprocess
import sys

import psutil
import pytest
from redis.exceptions import ConnectionError

from miles.queue import RedisRefused, RedisServer, RedisStartError, RedisUnsuitable, connect, connect_async


def test_what_was_written_is_there_after_a_crash(tmp_path: pathlib.Path) -> None:
    server = RedisServer(tmp_path).start()
    client = connect(server.url)
    client.set("key", "value")
    client.close()
    server.kill()
    assert server.pid is None
    with server:
        client = connect(server.url)
        assert client.get("key") == b"value"
        client.close()


def test_it_stops_cleanly_and_starts_again_on_a_port(tmp_path: pathlib.Path) -> None:
    with RedisServer(tmp_path, port=0, maxmemory_bytes=64 << 20, appendfsync="always") as server:
        assert server.url.startswith("redis://127.0.0.1:")
        client = connect(server.url)
        info = client.info()
        assert (info["maxmemory"], info["maxmemory_policy"], info["aof_enabled"]) == (64 << 20, "noeviction", 1)
        assert client.config_get("appendfsync") == {"appendfsync": "always"}
        client.rpush("list", "a")
        client.close()
    assert "User requested shutdown" in (tmp_path / "redis.log").read_text()
    with RedisServer(tmp_path, port=0) as server:
        client = connect(server.url)
        assert client.lrange("list", 0, -1) == [b"a"]
        client.close()


def test_a_path_too_long_for_a_unix_socket_still_works(tmp_path: pathlib.Path) -> None:
    with RedisServer(tmp_path / ("d" * 120)) as server:
        connect(server.url).close()


def test_two_servers_never_share_a_folder_but_one_left_over_can_be_replaced(tmp_path: pathlib.Path) -> None:
    first = RedisServer(tmp_path).start()
    client = connect(first.url)
    client.set("key", "value")
    client.close()
    with pytest.raises(RedisStartError, match=f"process {first.pid}"):
        RedisServer(tmp_path).start()
    with RedisServer(tmp_path).start(take_over=True) as second:
        assert first.pid is None
        client = connect(second.url)
        assert client.get("key") == b"value"
        client.close()


def test_a_server_that_cannot_start_says_why(tmp_path: pathlib.Path) -> None:
    (tmp_path / "appendonly.aof").write_bytes(b"*3\r\nthis is not an append-only file\r\n" * 3)
    with pytest.raises(RedisStartError, match="append only file"):
        RedisServer(tmp_path).start()


def test_an_evicting_server_is_refused(tmp_path: pathlib.Path) -> None:
    with RedisServer(tmp_path, maxmemory_bytes=64 << 20) as server:
        client = connect(server.url)
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.close()
        with pytest.raises(RedisUnsuitable, match="allkeys-lru"):
            connect(server.url)


async def test_an_absent_server_is_named_after_the_deadline() -> None:
    with pytest.raises(ConnectionError, match=r"unix:///nowhere.sock did not answer for"):
        await connect_async("unix:///nowhere.sock", deadline_s=0.2)


def test_the_server_runs_in_a_process_of_its_own(tmp_path: pathlib.Path) -> None:
    with RedisServer(tmp_path) as server:
        name = subprocess.run(["ps", "-o", "comm=", "-p", str(server.pid)], capture_output=True, text=True, check=True)
        assert "redis-server" in name.stdout


def test_a_server_ends_with_a_process_that_is_killed_if_it_is_asked_to(tmp_path: pathlib.Path) -> None:
    program = f"""
import time
from miles.queue import RedisServer
server = RedisServer({str(tmp_path)!r}, outlives_s=0.2).start()
server.kill()
print(server.start().pid, flush=True)
time.sleep(60)
"""
    starter = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    server = psutil.Process(int(starter.stdout.readline()))
    family = psutil.Process(starter.pid).children(recursive=True)
    assert len(family) == 2, "the server, and what waits for the end of its starter"
    starter.kill()
    starter.wait()
    starter.stdout.close()
    assert server in family
    assert psutil.wait_procs(family, timeout=20)[1] == []


def test_a_server_that_was_stopped_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    before = psutil.Process().children()
    RedisServer(tmp_path, outlives_s=60.0).start().stop()
    assert psutil.Process().children() == before


def test_on_an_address_for_other_machines_it_has_a_password_that_no_command_line_shows(tmp_path: pathlib.Path) -> None:
    with RedisServer(tmp_path, host="127.0.0.1") as server:
        password, _, place = server.url.removeprefix("redis://:").partition("@")
        client = connect(server.url)
        client.set("key", "value")
        client.close()
        with pytest.raises(RedisRefused):
            connect(f"redis://{place}")
        assert server.pid is not None
        assert password not in " ".join(psutil.Process(server.pid).cmdline())
        assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0
        assert (tmp_path / "redis.url").stat().st_mode & 0o077 == 0
        server.kill()
        server.start()
        client = connect(server.url)  # the same address, which clients know
        assert client.get("key") == b"value"
        client.close()
