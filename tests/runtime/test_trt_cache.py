import json
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mge_runtime.bundle import EngineDescription
from mge_runtime.errors import BundleError, OutputError
from mge_runtime.machine import Gpu
from mge_runtime.trt.engines import EngineDetails, cache_folder, cached_engines, store_engines
from mge_runtime.trt.target import BatchRange, Target

MANIFEST = "a" * 64
ORIN = Gpu("Orin", "sm87", 32 << 30, 16, integrated=True)
NANO = Gpu("Orin", "sm87", 8 << 30, 8, integrated=True)
TARGET = Target("tensorrt", "10.3", ("sm87",), "linux", "aarch64")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MGE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def details(gpu=ORIN):
    return EngineDetails("10.3.0.30", gpu, BatchRange(), {"gate": {"type": "fp16", "attested": "engine"}}, {}, "mge 1")


def store(tmp_path, content, gpu=ORIN, manifest=MANIFEST):
    plan = tmp_path / "gate.plan"
    plan.write_bytes(content)
    return store_engines(manifest, TARGET, gpu, {"gate": plan}, details(gpu))


def test_what_is_stored_is_found_each_device_has_its_own_and_a_new_one_replaces_the_old(tmp_path, cache):
    store(tmp_path, b"one")
    store(tmp_path, b"two")
    (found,) = cached_engines(MANIFEST)
    assert (bytes(found.plan("gate")), found.details, found.target) == (b"two", details(), TARGET)
    store(tmp_path, b"nano", NANO)
    assert [bytes(found.plan("gate")) for found in cached_engines(MANIFEST)] == [b"nano", b"two"]  # the newest first
    assert len([path for path in cache.rglob("*") if path.is_dir()]) == 4  # engines, the manifest, two devices
    assert len(list(cache.rglob("*.plan"))) == 2
    assert cached_engines("b" * 64) == []


def test_damage_is_told_when_the_engine_is_read(tmp_path, cache):
    found = store(tmp_path, b"engine")
    (plan,) = cache.rglob("gate-*.plan")
    plan.write_bytes(b"engins")
    with pytest.raises(BundleError, match=r"gate-\w+.plan: it was damaged after it was built; run mge-build again"):
        found.plan("gate")
    plan.unlink()
    with pytest.raises(BundleError, match=r"cannot read .*gate-\w+.plan: .*; run mge-build again"):
        found.plan("gate")


def test_what_a_killed_process_left_is_cleared_away(tmp_path, cache):
    store(tmp_path, b"engine")
    (folder,) = {path.parent for path in cache.rglob("*.plan")}
    (folder / "gate-0123456789abcdef.plan").write_bytes(b"an older engine")
    assert bytes(cached_engines(MANIFEST)[0].plan("gate")) == b"engine"
    store(tmp_path, b"again")
    assert len(list(folder.iterdir())) == 3, "engine.json, the plan, the lock"


@pytest.mark.parametrize("text", ["", "{}", json.dumps({"manifest_sha256": "b" * 64})])
def test_a_description_that_cannot_be_read_is_passed_over(tmp_path, cache, text):
    store(tmp_path, b"engine")
    (description,) = cache.rglob("engine.json")
    description.write_text(text)
    assert cached_engines(MANIFEST) == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, cache):
    cache.write_text("a file is in the way")
    with pytest.raises(OutputError, match=r"cannot keep the engines in .*: .*set MGE_CACHE_DIR to one, or build with"):
        store(tmp_path, b"engine")


def test_the_cache_lies_where_the_user_or_the_system_says(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MGE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_folder()) == "/somewhere/mge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/bird")
    assert str(cache_folder()) == "/home/bird/.cache/mge"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert cache_folder().parent == Path(tempfile.gettempdir())


def test_target_names_are_read_as_they_are_written():
    for name in ("tensorrt-10.3-sm87-linux-aarch64", "tensorrt-rtx-1.7-sm86-sm120-windows-x86_64"):
        assert Target.parse(name).name == str(Target.parse(name)) == name
    for name in ("tensorrt-10.3-linux-x86_64", "openvino-1.0-sm86-linux-x86_64", "tensorrt-10.3-sm87"):
        with pytest.raises(BundleError, match=f"the bundle has engines for '{name}', which is no target"):
            Target.parse(name)


def test_many_that_store_at_once_all_succeed_and_engines_are_found_all_the_while(tmp_path):
    store(tmp_path, b"first")
    (tmp_path / "plan").write_bytes(b"again")
    missing, done = [], threading.Event()

    def look():
        while not done.is_set():
            if not cached_engines(MANIFEST):
                missing.append(1)

    with ThreadPoolExecutor(5) as pool:
        looking = pool.submit(look)
        plans = {"gate": tmp_path / "plan"}
        try:
            list(pool.map(lambda _: store_engines(MANIFEST, TARGET, ORIN, plans, details()), range(40)))
        finally:
            done.set()
        looking.result()
    assert not missing
    assert bytes(cached_engines(MANIFEST)[0].plan("gate")) == b"again"


@pytest.mark.parametrize("batch", [[1, 1, 5000], [0, 1, 2], [2, 1, 8], [1, 8], "8"])
def test_a_batch_range_of_another_version_is_told_with_its_target(batch):
    facts = details().to_dict() | {"batch": batch}
    description = EngineDescription(MANIFEST, TARGET.name, {}, facts)
    with pytest.raises(BundleError, match=rf"engines/{TARGET}/engine.json: details.batch.* build them again"):
        EngineDetails.from_description(description)
