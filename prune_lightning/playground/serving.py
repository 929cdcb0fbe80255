"""Serves the playground on this machine, without any call to another."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

from prune_lightning.editor import Editor
from prune_lightning.errors import UserError
from prune_lightning.playground.ground import Playground

LOOPBACK = "127.0.0.1"


def check_gradio() -> None:
    """Raise an error if Gradio is missing.

    Raises:
        UserError: It is.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the playground needs Gradio: pip install 'prune-lightning[play]'")


@contextmanager
def served(
    editor: Editor, kept: bool = False, host: str = LOOPBACK, port: int | None = None, browser: bool = False
) -> Iterator[str]:
    """Serve an editor inside the block, and yield the address.

    Args:
        editor: The editor; nothing else may use it meanwhile.
        kept: Whether its edits are kept when the playground ends.
        host: Address to listen on; only this machine can reach the default.
        port: Port; the first free one from 7860 by default.
        browser: Whether to open it in the browser.

    Raises:
        UserError: Gradio is missing, or the address cannot be listened on.
    """
    check_gradio()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported
    from prune_lightning.playground.page import CSS, Page, theme

    ground = Playground(editor)
    blocks = Page(ground, kept).build()
    blocks.queue(default_concurrency_limit=1)
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            inbrowser=browser,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            theme=theme(),
            css_paths=CSS,
        )
    except OSError as error:
        raise UserError(f"the playground cannot listen on {host}, port {port or 'from 7860'}: {error}") from error
    try:
        yield address
    finally:
        ground.end()  # the editor is about to be closed
        blocks.close(verbose=False)
