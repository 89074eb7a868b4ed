"""What is written for NVIDIA Triton Inference Server, against the server's own schema and rules."""

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from google.protobuf import descriptor_pool, message_factory, text_format

from ulae_rt.errors import EngineMismatch, OutputError, UsageError
from ulae_rt.export.serving import config_of, write_repository
from ulae_rt.manifest import (
    NOT_RUN,
    TOLERANCES,
    VERIFIED,
    EngineMetadata,
    Manifest,
    TensorSpec,
    Work,
    sha256,
)

GRID = (16, 32, 16)
MODEL_FILES = {"onnxruntime_onnx": "model.onnx", "tensorrt_plan": "model.plan"}


@pytest.fixture(scope="module")
def schema():
    """The message ``ModelConfig``, as tritonclient 2.73.0 publishes it.

    Recorded, because the client itself asks for an older protobuf than onnx is tested with. It is
    ``tritonclient.grpc.model_config_pb2.DESCRIPTOR.serialized_pb``.
    """
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(Path(__file__).with_name("model_config.pb").read_bytes())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def graph(batch):
    """An ONNX model with the inputs and outputs of the network."""
    image, disp = (["batch" if batch == -1 else batch, n, *GRID] for n in (1, 3))
    value = onnx.helper.make_tensor_value_info
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                onnx.helper.make_node("Identity", ["moving"], ["moved"]),
                onnx.helper.make_node("Concat", ["moving", "fixed", "fixed"], ["disp"], axis=1),
            ],
            "graph",
            [value("moving", 1, image), value("fixed", 1, image)],
            [value("moved", 1, image), value("disp", 1, disp)],
        )
    )
    return model.SerializeToString()


def artefact(folder, kind="onnx", batch=1, name="ulae-net-fp16", **changes):
    """A file and its manifest."""
    path = folder / f"{name}.{'onnx' if kind == 'onnx' else 'engine'}"
    content = graph(batch) if kind == "onnx" else b"a plan"
    path.write_bytes(content)

    def spec(name, channels, units, components):
        return TensorSpec(name, (batch, channels, *GRID), "float32", units, components)

    intensity = ("intensity in [0, 1]", ("intensity",))
    manifest = Manifest(
        artefact=path.name,
        kind=kind,
        precision="fp16",
        target="any" if kind == "onnx" else "sm90",
        compatibility="none",
        inputs=(spec("moving", 1, *intensity), spec("fixed", 1, *intensity)),
        outputs=(
            spec("moved", 1, *intensity),
            spec("disp", 3, 'voxels; "moved(p) = moving(p + disp(p))"', ("d", "h", "w")),
        ),
        metadata=EngineMetadata("paper", GRID, 1.0, "max", "OASIS", "CC BY-NC 4.0"),
        preprocessing=("resample to 1 mm", "divide by the maximum \\ nothing else"),
        versions={"tensorrt": "11.4.0.106"},
        work=Work(312.0, 12.0, 700),
        types={"convolution float16": 81},
        weights_sha256="a" * 64,
        artefact_sha256=sha256(content),
        status=VERIFIED,
        tolerance=TOLERANCES["fp16"],
        errors=(),
        date="2026-11-22T00:00:00+00:00",
    )
    return path, replace(manifest, **changes)


def check(model, schema):
    """The documented rules of a model and its configuration; the configuration."""
    text = (model / "config.pbtxt").read_text()
    config = text_format.Parse(text, schema())
    assert config.name == model.name
    assert sorted(entry.name for entry in model.iterdir()) == ["1", "config.pbtxt"]
    assert [entry.name for entry in (model / "1").iterdir()] == [MODEL_FILES[config.platform]]
    assert config.max_batch_size >= 0
    inputs = {entry.name: entry for entry in config.input}
    for entry in (*config.input, *config.output):
        assert len(entry.dims) == (5 if config.max_batch_size == 0 else 4)
        assert all(size > 0 for size in entry.dims)
    if config.HasField("dynamic_batching"):
        sizes = config.dynamic_batching.preferred_batch_size
        assert all(0 < size <= config.max_batch_size for size in sizes)
    else:
        assert config.max_batch_size == 0
    assert config.model_warmup
    for warmup in config.model_warmup:
        # A model that does not batch is warmed with one request of its full shape.
        assert 0 < warmup.batch_size <= max(1, config.max_batch_size)
        assert warmup.inputs.keys() == inputs.keys()
        for name, entry in warmup.inputs.items():
            assert entry.dims == inputs[name].dims
            assert entry.data_type == inputs[name].data_type
            assert entry.zero_data
    return config


def kinds(schema, config):
    """Names of the kinds of instance groups."""
    enum = schema.DESCRIPTOR.fields_by_name["instance_group"].message_type.enum_types_by_name
    names = enum["Kind"].values_by_number
    return [(group.count, names[group.kind].name) for group in config.instance_group]


@pytest.mark.parametrize("batch", [1, 4, -1])
def test_onnx_model_fits_the_schema_and_its_own_graph(tmp_path, schema, batch):
    made = artefact(tmp_path, batch=batch)
    (model,) = write_repository(tmp_path / "new" / "repository", [made], overwrite=False)
    assert model == tmp_path / "new" / "repository" / "ulae-net-fp16"
    config = check(model, schema)
    assert config.platform == "onnxruntime_onnx"
    assert kinds(schema, config) == [(1, "KIND_AUTO")]
    assert not config.optimization.cuda.graphs
    assert (model / "1" / "model.onnx").read_bytes() == made[0].read_bytes()

    loaded = onnx.load(model / "1" / "model.onnx").graph
    for entries, values in ((config.input, loaded.input), (config.output, loaded.output)):
        assert [entry.name for entry in entries] == [value.name for value in values]
        for entry, value in zip(entries, values, strict=True):
            sizes = [size.dim_value for size in value.type.tensor_type.shape.dim]
            assert list(entry.dims) == (sizes if batch > 0 else sizes[1:])
            assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
            assert (
                entry.data_type
                == schema.DESCRIPTOR.file.enum_types_by_name["DataType"]
                .values_by_name["TYPE_FP32"]
                .number
            )

    if batch == -1:
        assert config.max_batch_size == 8
        assert list(config.dynamic_batching.preferred_batch_size) == [2, 4, 8]
        assert config.dynamic_batching.max_queue_delay_microseconds == 2000
        assert [warmup.batch_size for warmup in config.model_warmup] == [1, 2, 4, 8]
    else:
        assert [warmup.name for warmup in config.model_warmup] == [f"batch {batch}"]


def test_tensorrt_model_runs_on_a_gpu_with_cuda_graphs(tmp_path, schema):
    made = artefact(tmp_path, "tensorrt", name="ulae-net-fp16-trt-sm90")
    (model,) = write_repository(tmp_path / "repository", [made], overwrite=False)
    config = check(model, schema)
    assert config.platform == "tensorrt_plan"
    assert kinds(schema, config) == [(1, "KIND_GPU")]
    assert config.optimization.cuda.graphs
    assert config.parameters["ulae_rt.tensorrt_version"].string_value == "11.4.0.106"


def test_parameters_say_what_goes_in_and_comes_out(tmp_path, schema):
    config = text_format.Parse(config_of("name", artefact(tmp_path)[1]), schema())
    said = {key: value.string_value for key, value in config.parameters.items()}
    assert said["ulae_rt.weights_sha256"] == "a" * 64
    assert said["ulae_rt.disp.components"] == "d, h, w"
    assert said["ulae_rt.disp.units"] == 'voxels; "moved(p) = moving(p + disp(p))"'
    assert said["ulae_rt.moving.units"] == "intensity in [0, 1]"
    assert said["ulae_rt.preprocessing.2"] == "divide by the maximum \\ nothing else"
    assert said["ulae_rt.licence"] == "CC BY-NC 4.0"


def test_what_the_server_cannot_open_is_left_out_by_name(tmp_path, caplog):
    artefacts = [
        artefact(tmp_path),
        artefact(tmp_path, "tensorrt-rtx", name="rtx"),
        artefact(tmp_path, "pt2", name="program"),
        artefact(tmp_path, name="unverified", status=NOT_RUN),
    ]
    models = write_repository(tmp_path / "repository", artefacts, overwrite=False)
    assert [model.name for model in models] == ["ulae-net-fp16"]
    assert [text.split(" is not in")[0] for text in caplog.messages] == [
        "rtx.engine",
        "program.engine",
        "unverified.onnx",
    ]
    assert "no backend for TensorRT-RTX" in caplog.text
    with pytest.raises(UsageError, match="none of the artefacts"):
        write_repository(tmp_path / "other", artefacts[1:2], overwrite=False)
    assert not (tmp_path / "other").exists()


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.follows("pass --overwrite, or another --triton-repository")
def test_models_are_replaced_only_when_told(tmp_path):
    repository = tmp_path / "repository"
    (repository / "other" / "1").mkdir(parents=True)
    (repository / "other" / "1" / "model.py").write_text("somebody's")
    first = artefact(tmp_path)
    write_repository(repository, [first], overwrite=False)
    before = files(repository)
    second = artefact(tmp_path, batch=4)
    with pytest.raises(OutputError, match="ulae-net-fp16: is there already") as caught:
        write_repository(repository, [second], overwrite=False)
    assert "--overwrite" in caught.value.hint
    assert files(repository) == before

    write_repository(repository, [second], overwrite=True)
    after = files(repository)
    assert after.keys() == before.keys()
    assert write_repository(tmp_path / "another", [second], overwrite=False)
    assert after[Path("ulae-net-fp16/1/model.onnx")] == graph(4)
    assert sorted(path.name for path in repository.iterdir()) == ["other", "ulae-net-fp16"]


@pytest.mark.follows("free some space or give another --triton-repository")
def test_full_disk_changes_nothing(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    write_repository(repository, [artefact(tmp_path)], overwrite=False)
    before = files(repository)
    artefacts = [artefact(tmp_path, batch=4), artefact(tmp_path, name="second")]
    write = Path.write_text

    def full(self, text, encoding):
        write(self, text[:10], encoding=encoding)
        if self.parent.name == "second" and repository in self.parents:
            raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"second/config.pbtxt: cannot .*No space left") as caught:
        write_repository(repository, artefacts, overwrite=True)
    assert files(repository) == before
    assert [path.name for path in repository.iterdir()] == ["ulae-net-fp16"]
    assert caught.value.hint == "free some space or give another --triton-repository"
    assert len(write_repository(tmp_path / "another", artefacts, overwrite=False)) == 2
    monkeypatch.undo()  # there is space now
    assert len(write_repository(repository, artefacts, overwrite=True)) == 2


def test_failure_between_two_models_takes_the_first_back(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    write_repository(repository, [artefact(tmp_path)], overwrite=False)
    before = files(repository)
    artefacts = [
        artefact(tmp_path, batch=4),
        artefact(tmp_path, name="new"),
        artefact(tmp_path, name="last"),
    ]
    rename = Path.rename

    def fail(self, target):
        if Path(target).name == "last":
            raise OSError(13, "Permission denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="Permission denied"):
        write_repository(repository, artefacts, overwrite=True)
    assert files(repository) == before
    assert [path.name for path in repository.iterdir()] == ["ulae-net-fp16"]


def test_edited_artefact_is_not_served(tmp_path):
    path, manifest = artefact(tmp_path)
    path.write_bytes(path.read_bytes() + b"edited")
    with pytest.raises(EngineMismatch, match="is not the file its manifest is of"):
        write_repository(tmp_path / "repository", [(path, manifest)], overwrite=False)
    assert not (tmp_path / "repository").exists()


def test_folder_that_is_a_file_is_one_error(tmp_path):
    made = artefact(tmp_path)
    with pytest.raises(OutputError, match="cannot be written"):
        write_repository(made[0], [made], overwrite=False)


@pytest.mark.parametrize(
    ("what", "with_"),
    [
        ('platform: "onnxruntime_onnx"', "platform: onnxruntime_onnx"),
        ("max_batch_size: 0", "max_batch: 0"),
        ("TYPE_FP32", "TYPE_FLOAT"),
        ("KIND_AUTO", "KIND_ANY"),
        ("zero_data: true", "zeros: true"),
    ],
)
def test_schema_refuses_what_the_server_would(tmp_path, schema, what, with_):
    text = config_of("name", artefact(tmp_path)[1])
    text_format.Parse(text, schema())
    assert what in text
    with pytest.raises(text_format.ParseError):
        text_format.Parse(text.replace(what, with_), schema())
