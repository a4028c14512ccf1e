"""The contenders of `mge-bench`: parts of the stages, PyTorch, pictures in a row; energy."""

from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mge_runtime.backends.onnxruntime_cuda import open_ort_chain
from mge_runtime.backends.ort import load_onnxruntime
from mge_runtime.bench import toolchain
from mge_runtime.bench.contenders import PartsContender
from mge_runtime.bench.deadline import UNBOUNDED, Deadline, TimeUp
from mge_runtime.bench.energy import find_meter, measure_energy
from mge_runtime.bench.inputs import Inputs, photograph_inputs
from mge_runtime.bench.measure import measure_batch
from mge_runtime.bench.parts import HeadBundle, TrunkBundle, TrunkChainBundle
from mge_runtime.bench.pipelined import measure_pipelined
from mge_runtime.bench.report_tables import _batch
from mge_runtime.bench.rounds import Series, Stepped
from mge_runtime.bench.shares import derived_shares
from mge_runtime.bundle import Bundle
from mge_runtime.device.host import HostDevice
from mge_runtime.errors import InputError
from mge_runtime.pipeline import Pipeline
from mge_runtime.sources import find_images

onnxruntime = load_onnxruntime()


@pytest.fixture(scope="module")
def inputs(photos, tmp_path_factory):
    """Photographs in files, with what a 32-pixel chain reads of them."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, photo in enumerate(photos):
        Image.fromarray(photo).save(folder / f"{number}.png")
    frames = np.random.default_rng(0).integers(0, 256, (len(photos), 32, 32, 3), np.uint8)
    return Inputs(tuple(sorted(folder.iterdir())), frames, "photographs")


class Fake(Stepped):
    """Does nothing."""

    unit = "ms"

    def __init__(self, name):
        self.name = name
        self.steps_ms = {}

    def run(self):
        pass

    def close(self):
        pass


def test_shares_are_differences_within_a_round(bundle_path):
    with Bundle.open(bundle_path) as bundle:
        manifest = bundle.manifest

    def series(rounds, steps):
        return Series(None, [[ms] for ms in rounds], [[step] for step in steps])

    whole = {"ingest": 1.0, "expert_1": 30.0, "expert_2": 30.0, "expert_3": 30.0, "gate": 21.0, "mixture": 2.0}
    chain = series([120, 240], [whole, {k: 2 * v for k, v in whole.items()}])
    bare = {"expert_1": 20.0, "expert_2": 20.0, "expert_3": 20.0, "gate": 20.0}
    trunks = series([80, 160], [bare, {k: 2 * v for k, v in bare.items()}])
    cut = {"expert_1": 25.0, "expert_2": 25.0, "expert_3": 25.0}
    heads = series([75, 150], [cut, {k: 2 * v for k, v in cut.items()}])
    found = [share.rounds for share in derived_shares(manifest, chain, trunks, heads)]
    assert found[0] == pytest.approx((80 / 120, 80 / 120))
    assert found[1] == pytest.approx((16 / 120, 16 / 120))  # 3 x 5 and the gate's 1
    assert found[2] == pytest.approx((16 / 120, 16 / 120))  # 3 x 5 and ingest's 1


def test_parts_are_opened_by_the_backend_itself(trunked):
    with Pipeline.open(trunked, "cpu", threads=1) as pipeline:
        frames = np.zeros((2, 32, 32, 3), np.uint8)
        images = pipeline.run(frames, outputs=["image_1", "image_2", "image_3"])
        parts = PartsContender("trunks", TrunkBundle, pipeline.choice, str(trunked), images, 1)
        parts.run()
        assert list(parts.steps_ms) == ["expert_1", "expert_2", "expert_3"]
        parts.close()
        heads = PartsContender("heads", HeadBundle, pipeline.choice, str(trunked), images, 1)
        heads.run()
        assert list(heads.steps_ms) == list(parts.steps_ms)
        heads.close()


def test_on_a_device_the_trunks_are_one_chain_on_the_first_image(trunked):
    device = HostDevice()
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    with ExitStack() as stack:
        bundle = stack.enter_context(TrunkChainBundle.open(trunked))
        assert [stage.name for stage in bundle.manifest.stages] == ["ingest", "expert_1", "expert_2", "expert_3"]
        assert {stage.inputs[0].name for stage in bundle.manifest.stages[1:]} == {"image_1"}
        chain = open_ort_chain(onnxruntime, bundle, device)
        stack.callback(chain.close)
        assert dict(chain.run(frames, 1, ()).tensors) == {}
        found = chain.run(frames, 1, ["c5_expert_1"]).tensors["c5_expert_1"]
        assert {"upload", "chain", "download"} <= chain.run(frames, 1, ()).times_ms.keys()
    with Pipeline.open(trunked, "cpu", threads=1) as pipeline:
        heatmap = pipeline.run(frames)["heatmap_1"]
    np.testing.assert_allclose(found.mean(1), heatmap, rtol=1e-5, atol=1e-6)
    assert (device.allocated, device.allocated_host) == (0, 0)


def test_pytorch_gets_the_chains_threads_and_the_report_says_how_many_it_used(trunked, inputs, monkeypatch):
    asked = []

    class Way(Fake):
        threads = 3

    def make(_ckpt, _frames, threads, _device):
        asked.append(threads)
        return [Way("PyTorch eager")]

    monkeypatch.setattr(toolchain, "_imported", lambda _: SimpleNamespace(eager_contenders=make))
    monkeypatch.setattr(toolchain, "cpu_count", lambda: 3)
    with Pipeline.open(trunked, "cpu", threads=1) as pipeline:
        kind = {"ckpt": trunked, "iterations": 5, "warmup": 1, "deadline": UNBOUNDED, "say": lambda _line: None}
        results = []
        measure_batch(pipeline, trunked, inputs, 1, threads=None, keep=results.append, **kind)
        measure_batch(pipeline, trunked, inputs, 1, threads=1, keep=results.append, **kind)
    found = results[0]
    assert asked == [3, 1]
    assert found.pytorch_threads == {"PyTorch eager": 3}
    assert "PyTorch computes with 3 threads" in next(iter(_batch(found))).notes


def test_pictures_in_a_row_are_answered_both_ways(trunked, inputs):
    kept = []
    with Pipeline.open(trunked, "cpu", threads=1) as pipeline:
        kind = {"say": lambda _line: None, "keep": kept.append}
        for images in (10, 321, 1):
            measure_pipelined(pipeline, inputs, 2, images, chain_ms=1.0, deadline=UNBOUNDED, **kind)
        for images in (None, 1000):
            # By the chain's time that is named 15 runs of 2 fit, both ways; by the clock more do.
            measure_pipelined(pipeline, inputs, 2, images, chain_ms=1000.0, deadline=Deadline.after(30.9), **kind)
        with pytest.raises(TimeUp):
            measure_pipelined(pipeline, inputs, 2, None, chain_ms=1000.0, deadline=Deadline.after(7), **kind)
    few, many, one, open_ended, cut = kept
    assert cut.images == 30
    assert (few.images, few.distinct, few.round_images) == (10, 7, (3, 3, 4))
    assert (many.images, sum(many.round_images), max(many.round_images)) == (321, 321, 46)
    assert len(many.files_s) == len(many.frames_s) == 7
    assert one.round_images == (1,)
    assert open_ended.round_images == (10, 10, 10)
    assert few.ratio.median == pytest.approx(sorted(a / b for a, b in zip(few.files_s, few.frames_s, strict=True))[1])
    assert few.total_ratio == pytest.approx(sum(few.files_s) / sum(few.frames_s))
    assert few.image_ms(few.files_s)[2] == pytest.approx(1e3 * few.files_s[2] / 4)


def test_energy_is_read_from_every_package_and_each_counter_wraps_by_itself(tmp_path):
    assert "no energy counters" in find_meter("cpu", tmp_path)

    def write(number, microjoules):
        zone = tmp_path / f"intel-rapl:{number}"
        zone.mkdir(exist_ok=True)
        (zone / "name").write_text(f"package-{number}\n")
        (zone / "energy_uj").write_text(f"{microjoules}\n")
        (zone / "max_energy_range_uj").write_text(f"{(number + 1) * 10_000_000}\n")

    write(0, 9_000_000)
    write(1, 4_000_000)
    (tmp_path / "intel-rapl:0:0").mkdir()
    (tmp_path / "intel-rapl:0:0" / "name").write_text("core\n")
    meter = find_meter("cpu", tmp_path)
    assert meter.name == "RAPL, 2 processor package(s)"

    class Chain(Fake):
        def run(self):
            write(0, 1_000_000)  # past its 10 J: 2 J
            write(1, 12_000_000)  # 8 J more: the sum of both has not become less

    energy = measure_energy(meter, Chain("chain"), 4, seconds=0)
    assert (energy.joules, energy.images, energy.joules_per_image) == (pytest.approx(10.0), 4, pytest.approx(2.5))
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert "cannot be read" in find_meter("cpu", tmp_path)


def test_photographs_stay_in_their_files(photos, trunked, tmp_path):
    for number, photo in enumerate(photos[:3]):
        Image.fromarray(photo).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    problems = []
    with Bundle.open(trunked) as bundle:
        listed = find_images([str(tmp_path)]).images
        found = photograph_inputs(listed, bundle.manifest.preprocess, report=problems.append)
        with pytest.raises(InputError, match=r"bad\.png"):
            photograph_inputs(listed[-1:], bundle.manifest.preprocess)
    (problem,) = problems
    assert "bad.png" in str(problem)
    assert found.files == tuple(tmp_path / f"{number}.png" for number in range(3))
    assert (
        found.source == f"3 of 4 named images of {sum(f.stat().st_size for f in found.files) / 3e6:.2f} MB on average"
    )
    files, frames = found.batch(5)
    assert [files[n] for n in (0, 3)] == [found.files[0].read_bytes()] * 2
    assert frames.shape == (5, 32, 32, 3)
    assert (frames[1] == frames[4]).all()
    found.files[1].unlink()
    assert len(found.batch(1)[0]) == 1, "only what a round needs is read"
    with pytest.raises(InputError, match=r"cannot read .*1\.png"):
        found.batch(2)
