"""The web page of one run: draw, edit and caption in a browser (docs/web.md)."""

import os

# The libraries of the page read these when they are imported, which is after this file.
os.environ.update(
    NICEGUI_STORAGE_PATH=os.devnull,  # nothing is kept on disk
    FASTAPI_OTEL_AUTO_CONFIGURE="false",  # nothing is reported to anybody
    OTEL_SDK_DISABLED="true",
)
os.environ.pop("NICEGUI_REDIS_URL", None)
