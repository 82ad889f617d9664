"""`calpaca serve`."""

from __future__ import annotations

import logging
from ipaddress import ip_address
from secrets import token_urlsafe
from typing import Any

import click

from calpaca.cli.flags import flags, group_of
from calpaca.cli.run import AppCommand, shared_runtime, was_typed
from calpaca.core.engine_choice import DEFAULT
from calpaca_openai_api.settings import ServeOptions, read_serve_options

log = logging.getLogger("calpaca")


@click.pass_context
def _serve(ctx: click.Context, /, **values: Any) -> None:
    runtime = shared_runtime()
    typed = {name: value for name, value in values.items() if was_typed(ctx, name)}
    options, keys = read_serve_options(typed, runtime.settings.plugins.get("openai_api", {}))
    from calpaca_openai_api.announcing import announcement, attached_key
    from calpaca_openai_api.process import Server, open_socket, run
    from calpaca_openai_api.served import ServedModels
    from calpaca_openai_api.server import build_app

    spec, adapters = runtime.check(options.spec()), options.named_adapters
    if adapters and spec.engine == "auto":
        spec = spec.model_copy(update={"engine": DEFAULT})  # the one that runs several side by side
    listener = open_socket(options.host, options.port)
    runtime.purpose = "load"
    with runtime:
        models = ServedModels(runtime, spec, options.embedding, adapters)
        model = models.main.load()
        models.load_adapters()
        secret = token_urlsafe() if keys else None
        app, api = build_app(models, options, keys | attached_key(secret))
        host, port = listener.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        scheme = "https" if options.tls_cert is not None else "http"
        log.info("Serving %s with %s at %s://%s:%s/v1", models.main.id, model.engine.name, scheme, address, port)
        local = "127.0.0.1" if ip_address(host).is_unspecified else address
        with announcement(f"{scheme}://{local}:{port}/v1", secret, models):
            run(Server(app, api, options), listener)


serve = AppCommand(
    "serve",
    params=flags("serve", ServeOptions),
    callback=_serve,
    help="""Serves models and apps to OpenAI clients.

    Chats, completions and embeddings at http://HOST:PORT/v1, for the model of these options, the named models of the
    settings, and every installed app that only reads, as the model app:NAME. --adapter NAME=PATH serves an adapter beside
    the model, as a model of its own. The section [plugins.openai_api] of the
    settings holds the same options, and keys.
    """,
    groups={name: group_of(ServeOptions, name) for name in ServeOptions.model_fields},
)
