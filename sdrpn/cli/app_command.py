"""`sdrpn app`: a page in the browser, with both answers side by side."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from sdrpn import model_registry
from sdrpn.cli.shared import (
    DtypeOption,
    ModelOption,
    PaddingOption,
    ProposerOption,
    RpnOption,
    RpnRevisionOption,
    load_zoom,
    report_errors,
    say,
    weights_hint,
)
from sdrpn.io.extras import needs

TEMPORARY = "GRADIO_TEMP_DIR"


def app_command(
    model: ModelOption = "tiny",
    rpn: RpnOption = None,
    rpn_revision: RpnRevisionOption = None,
    proposer: ProposerOption = "rpn",
    dtype: DtypeOption = "auto",
    padding: PaddingOption = None,
    host: Annotated[
        str,
        typer.Option(
            envvar="GRADIO_SERVER_NAME", help="Address to listen on; 0.0.0.0: every network."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="GRADIO_SERVER_PORT", help="0: any free one.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Also open a public address, through gradio's servers.")
    ] = False,
) -> None:
    """Ask in the browser: stock model and second look side by side, with map, box and crop.

    Example: sdrpn app --model tiny
    """
    with report_errors():
        needs("gradio", "matplotlib", "pyarrow", extra="app", what="sdrpn app")
    with report_errors(weights_hint(model)):
        zoom = load_zoom(model, rpn, proposer, None, None, dtype, padding, rpn_revision)
    # SIGTERM too removes the temporary folder.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with TemporaryDirectory(prefix="sdrpn-app-", dir=os.environ.get(TEMPORARY)) as folder:
        # Read by gradio when components are made: uploads and pictures go here, and with it.
        os.environ[TEMPORARY] = folder
        os.environ["GRADIO_RUN_HISTORY"] = "False"  # no copy of a question in the browser
        from sdrpn.app import SideBySide, build_page

        asked = SideBySide(zoom)
        asked.warm_up()
        page = build_page(asked, model_registry.examples(model), Path(folder), model)
        with report_errors():
            _, address, public = page.launch(
                server_name=host,
                server_port=port,
                share=share,
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
                footer_links=["api", "gradio"],
            )
        say(f"{model} is at {public or address} (Ctrl-C ends it)")
        page.block_thread()
