"""Adapters as models of their own beside their base: never mixed, loaded and unloaded while the server runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from calpaca.core.attaching import find_running
from calpaca.core.errors import AdapterError, UnsupportedError, UsageError
from calpaca.core.files import find_files
from calpaca.core.spec import AdapterSpec, ModelSpec
from calpaca_openai_api.announcing import announcement
from calpaca_openai_api.settings import KeySettings, ServeOptions, digest

BASE = "smollm2-135m-instruct"
SECRETS = {"ann": "use", "root": "admin"}
LONG = [{"role": "user", "content": "Count from one to one thousand, in words, one number a line."}]


def write_adapter(folder: Path, smollm2: Path, seed: int, **options) -> Path:
    """A random LoRA adapter that changes answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    config = LoraConfig(**{"r": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options})
    tuned = get_peft_model(model, config)
    torch.manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.06)
    tuned.save_pretrained(folder, save_embedding_layers="modules_to_save" in options)
    return folder


@pytest.fixture(scope="module")
def folders(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(folder / name, smollm2, seed) for seed, name in enumerate(("red", "blue", "late"))}


@pytest.fixture(scope="module")
def server(serving, folders) -> Iterator:
    """SmolLM2 in float32 with `red` and `blue` beside it; `late` can be loaded with the key `admin`."""
    options = ServeOptions(
        model=BASE, dtype="float32", engine="transformers", port=0, temperature=0.0,
        adapters=[f"{name}={folders[name]}" for name in ("red", "blue")],
    )  # fmt: skip
    scopes = {"ann": ("inference", "metrics"), "root": ("admin",)}
    keys = {name: KeySettings(sha256=digest(SECRETS[name]), scopes=scopes[name]) for name in SECRETS}
    with serving(options, keys) as running:
        yield running


@pytest.fixture
async def client(server):
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="use", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture
def administer(server):
    """`administer(path, **fields)` asks with the key that may."""

    def ask(path: str, key: str = "admin", **fields) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx2.post(f"{server.url}/v1/{path}_lora_adapter", json=fields, headers=headers, timeout=60)

    return ask


async def answer(client, model: str, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    chat = await client.chat.completions.create(
        model=model, messages=messages, max_tokens=12, extra_body={"return_token_ids": True}
    )
    assert chat.model == model
    return chat.choices[0].token_ids


async def test_adapters_are_listed_with_their_parent(client, fits) -> None:
    listed = json.loads((await client.models.list()).to_json())
    fits("ListModelsResponse", listed)
    parents = {model["id"]: model.get("parent") for model in listed["data"]}
    assert parents[BASE] is None
    assert parents["red"] == parents["blue"] == BASE


async def test_eight_clients_on_base_and_two_adapters_at_once_get_what_each_gets_alone(client) -> None:
    asked = [(model, f"Name {count} animals.") for count in (2, 3, 4) for model in (BASE, "red", "blue")][:8]
    alone = [await answer(client, *each) for each in asked]
    together = await asyncio.gather(*(answer(client, *each) for each in asked * 2))
    assert together == alone * 2
    assert alone[0] != alone[1] != alone[2] != alone[0]


async def test_an_adapter_is_loaded_and_unloaded_and_what_runs_with_it_ends(
    client, administer, server, folders
) -> None:
    response = administer("load", lora_name="late", lora_path=str(folders["late"]), scale=0.5)
    assert (response.status_code, response.json()["parent"]) == (200, BASE)
    assert administer("load", lora_name="late", lora_path=str(folders["late"])).status_code == 400
    expected = await client.chat.completions.create(model="late", messages=LONG, max_tokens=30)
    stream = await client.chat.completions.create(model="late", messages=LONG, max_tokens=30, stream=True)
    first = await anext(aiter(stream))
    assert administer("unload", lora_name="late").json()["deleted"] is True
    rest = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert first.choices[0].delta.content + "".join(rest) == expected.choices[0].message.content
    with pytest.raises(openai.NotFoundError) as error:
        await client.chat.completions.create(model="late", messages=LONG)
    assert error.value.code == "model_not_found"
    assert administer("unload", lora_name="late").status_code == 404
    assert administer("unload", lora_name=BASE).status_code == 400
    assert server.settle()


async def test_other_processes_are_told_of_adapters_as_they_come_and_go(server, folders, until) -> None:
    models = server.api.models

    def found(name: str, scale: float = 1.0) -> str | None:
        """Who would be asked for the base with this adapter."""
        adapter = AdapterSpec(source=str(folders[name]), scale=scale)
        spec = ModelSpec(model=BASE, dtype="float32", device="cpu", adapters=(adapter,))
        running = find_running(find_files(spec, server.runtime))
        return running and running.model

    with announcement(f"{server.url}/v1", None, models):
        assert await until(lambda: found("red") is not None, 20)
        assert (found("red"), found("blue")) == (f"{server.url}/v1#red", f"{server.url}/v1#blue")
        assert found("red", scale=0.5) is found("late") is None
        models.add_adapter("late", AdapterSpec(source=str(folders["late"])), None)
        assert await until(lambda: found("late") == f"{server.url}/v1#late")
        models.remove_adapter("late")
        assert await until(lambda: found("late") is None)
    assert found("red") is None


def test_only_a_key_for_it_administers(administer, server, scripted, folders) -> None:
    refused = administer("load", key="use", lora_name="x", lora_path=str(folders["late"]))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    headers = {"Authorization": "Bearer admin"}
    chat = httpx2.post(f"{server.url}/v1/chat/completions", json={"messages": LONG}, headers=headers)
    assert chat.status_code == 403


async def test_without_such_a_key_nothing_can_be_administered(scripted) -> None:
    keys = {"ann": KeySettings(sha256=digest("a"))}
    for server in (scripted(), scripted(keys=keys)):
        server.client.headers["Authorization"] = "Bearer a"
        response = await server.post("/v1/load_lora_adapter", lora_name="x", lora_path="/tmp")
        assert response.status_code in (403, 404)


@pytest.mark.filterwarnings("ignore")  # PEFT's, about making such an adapter
def test_what_cannot_run_beside_others_is_refused_with_a_hint(administer, smollm2, tmp_path) -> None:
    merged = write_adapter(tmp_path / "vocabulary", smollm2, 1, modules_to_save=["lm_head"])
    response = administer("load", lora_name="odd", lora_path=str(merged))
    assert response.status_code == 400
    assert "calpaca models merge" in response.json()["error"]["message"]
    response = administer("load", lora_name="odd", lora_path=str(tmp_path / "nothing"))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "lora_path")
    response = administer("load", lora_name="odd", lora_path=str(merged), model="gpt-9")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_a_request_that_waited_while_its_adapter_went_is_a_404(server, folders) -> None:
    models = server.api.models
    models.add_adapter("gone", AdapterSpec(source=str(folders["late"])), None)
    model = models.language_model("gone").load()
    models.remove_adapter("gone")
    with pytest.raises(AdapterError, match="gone"):
        model.generate("a")


def test_names_and_paths_of_adapters_are_told_apart(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r=8").mkdir()
    options = ServeOptions(adapters=["red=some/folder@0.5", "r=8", "org/plain", "r=8@0.5"])
    assert options.named_adapters == {"red": AdapterSpec(source="some/folder", scale=0.5)}
    assert [str(adapter) for adapter in options.spec().adapters] == ["r=8", "org/plain", "r=8@0.5"]
    with pytest.raises(UsageError, match="'red'"):
        _ = ServeOptions(adapters=["red=a", "red=b"]).named_adapters


def test_an_engine_without_adapters_refuses_them_with_a_way_out(scripted, folders) -> None:
    models = scripted().api.models
    with pytest.raises(UnsupportedError, match=r"side by side.*--engine transformers"):
        models.add_adapter("red", AdapterSpec(source=str(folders["red"])), None)
    assert "red" not in models.ids
