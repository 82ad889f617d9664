"""Reading and writing tensors in both containers, against torch and safetensors themselves."""

import hashlib
import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from calpaca.core.checkpoint import safetensors, torch_zip
from calpaca.core.checkpoint.dtypes import code_of
from calpaca.core.checkpoint.manifest import weights_digest
from calpaca.core.checkpoint.plan import PlannedTensor, computed, copied, hugging_face_files, index_of
from calpaca.core.checkpoint.reader import open_checkpoint
from calpaca.core.checkpoint.stream import FileStream
from calpaca.core.errors import CorruptFileError, ModelError, ModelNotFoundError, UnsupportedError

WRITERS = {"safetensors": safetensors.write, "pth": torch_zip.write}


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(300, 40, generator=generator).to(torch.bfloat16),
        "bias": torch.randn(5, generator=generator),
        "slice": torch.arange(10)[2:6],
        "transposed": torch.arange(12).reshape(3, 4).t(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float16),
        "large": torch.randn(2300, 2300, generator=generator),  # more than one piece
    }


def plan(tensors):
    return [
        computed(name, code_of(tensor.dtype), tuple(tensor.shape), lambda tensor=tensor: tensor, origin="a test")
        for name, tensor in tensors.items()
    ]


def write(file, tensors, kind):
    with FileStream(file, file.name) as stream:
        WRITERS[kind](stream, plan(tensors))
    return stream


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_written_is_what_is_read(tmp_path, tensors, kind):
    file = tmp_path / f"model.{kind}"
    stream = write(file, tensors, kind)
    checkpoint = open_checkpoint(file)
    assert list(checkpoint.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert hashlib.sha256(b"".join(checkpoint.chunks(name))).hexdigest() == stream.tensors[name].sha256
    assert stream.record.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert stream.record.size == file.stat().st_size


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_a_written_pth(tmp_path, tensors, mmap):
    write(tmp_path / "model.pth", tensors, "pth")
    loaded = torch.load(tmp_path / "model.pth", weights_only=True, mmap=mmap)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_checksums_inside_a_written_pth_are_right(tmp_path, tensors):
    write(tmp_path / "model.pth", tensors, "pth")
    with zipfile.ZipFile(tmp_path / "model.pth") as archive:
        assert archive.testzip() is None


def test_the_safetensors_library_loads_what_is_written(tmp_path, tensors):
    write(tmp_path / "model.safetensors", tensors, "safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_what_the_libraries_write_is_read_the_same(tmp_path, tensors):
    torch.save(tensors, tmp_path / "model.bin")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    for file in (tmp_path / "model.bin", tmp_path / "model.safetensors"):
        checkpoint = open_checkpoint(file)
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_digests_of_tensors_do_not_depend_on_the_container(tmp_path, tensors):
    digests = {weights_digest(_records(tmp_path / f"model.{kind}", tensors, kind)) for kind in WRITERS}
    assert len(digests) == 1


def _records(file, tensors, kind):
    return write(file, tensors, kind).tensors


def test_pickled_code_is_refused_and_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"weight": torch.zeros(2), "code": Harm()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CorruptFileError, match="holds code instead of tensors; it was not run"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_an_old_pickle_is_refused_and_not_run(tmp_path):
    (tmp_path / "model.bin").write_bytes(pickle.dumps({"weight": [1.0]}))
    with pytest.raises(CorruptFileError, match=r"truncated, or was saved by a PyTorch older than 1\.6"):
        open_checkpoint(tmp_path / "model.bin")


def test_other_contents_of_a_pth_are_named(tmp_path):
    torch.save({"weight": torch.zeros(2), "epoch": 3}, tmp_path / "model.pth")
    with pytest.raises(UnsupportedError, match="holds int under 'epoch'"):
        open_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_truncated_file_is_refused(tmp_path, tensors, kind):
    file = tmp_path / f"model.{kind}"
    write(file, tensors, kind)
    file.write_bytes(file.read_bytes()[:-4000])
    with pytest.raises(CorruptFileError, match="truncated"):
        open_checkpoint(file)


def test_a_header_that_lies_about_a_shape_is_refused(tmp_path):
    save_file({"a": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content.replace(b"[4,4]", b"[4,5]"))
    with pytest.raises(CorruptFileError, match="no readable safetensors header"):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path, tensors):
    file = tmp_path / "model.safetensors"
    write(file, tensors, "safetensors")
    checkpoint = open_checkpoint(file)
    file.write_bytes(file.read_bytes()[:-4000])
    with pytest.raises(CorruptFileError, match=r"ends inside large"):
        list(checkpoint.chunks("large"))
    with pytest.raises(CorruptFileError, match=r"ends inside large"):
        checkpoint.read("large")


def sharded(folder, tensors):
    """A model in three files with their index."""
    files = hugging_face_files(plan(tensors), shard_size=20_000)
    for file in files:
        write(folder / file.name, {each.name: tensors[each.name] for each in file.tensors}, "safetensors")
    for name, content in index_of(files).items():
        (folder / name).write_text(json.dumps(content))
    return [file.name for file in files]


def test_shards_are_filled_up_to_their_size_and_a_larger_tensor_gets_one_alone(tmp_path, tensors):
    assert sharded(tmp_path, tensors) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    checkpoint = open_checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_a_missing_shard_is_named(tmp_path, tensors):
    (tmp_path / sharded(tmp_path, tensors)[1]).unlink()
    with pytest.raises(CorruptFileError, match=r"lacks 1 of the 3 files .* model-00002-of-00003"):
        open_checkpoint(tmp_path)


def test_an_index_of_other_files_is_refused(tmp_path, tensors):
    sharded(tmp_path, tensors)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["bias"] = content["weight_map"]["large"]
    del content["weight_map"]["slice"]
    index.write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match=r"1 tensors are not where it says and 1 are not listed \(bias\)"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("model-00001-of-00002", "model-00002-of-00002"):
        save_file({"weight": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CorruptFileError, match="weight is in model-00001"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_says_so(tmp_path):
    with pytest.raises(ModelNotFoundError, match="holds no weights"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_comes_out_too_short_is_an_error(tmp_path):
    short = PlannedTensor("weight", "F32", (4,), lambda: [b"1234"], "a test")
    with FileStream(tmp_path / "model", "model") as stream, pytest.raises(ModelError, match="came out with 4 bytes"):
        safetensors.write(stream, [short])


def test_copied_tensors_keep_their_bytes_under_another_name(tmp_path, tensors):
    write(tmp_path / "model.safetensors", tensors, "safetensors")
    source = open_checkpoint(tmp_path)
    with FileStream(tmp_path / "copy.pth", "copy.pth") as stream:
        torch_zip.write(stream, [copied(source, "large", "renamed")])
    assert torch.equal(torch.load(tmp_path / "copy.pth", weights_only=True)["renamed"], tensors["large"])
