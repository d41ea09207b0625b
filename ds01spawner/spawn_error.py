"""Our refusals and errors as the exceptions that the Hub shows on its form, in the progress stream and on REST."""

from __future__ import annotations

from tornado import web

from .errors import Ds01Error, Refusal

try:  # JupyterHub 6
    from jupyterhub.spawner import SpawnException as _SpawnException
except ImportError:  # JupyterHub 5
    _SpawnException = None


def spawn_error(error: Ds01Error) -> web.HTTPError:
    """`error` as the exception that the Hub shows on the form, in the progress stream and on REST (trap T12).

    A refusal is a SpawnException, which the Hub does not count as a failure of its own; what is broken is counted
    (`consecutive_failure_limit`). JupyterHub 6.1 reads only `jupyterhub_message` on the pages, so it is set as well.
    """
    text = error.sentence() if isinstance(error, Refusal) else error.message
    refused: web.HTTPError
    if _SpawnException is not None and isinstance(error, Refusal):
        refused = _SpawnException(text, reason=error.code.value, status_code=error.http_status)
    else:
        refused = web.HTTPError(error.http_status, text.replace("%", "%%"), reason=error.code.value)
    vars(refused).update(jupyterhub_message=text, ds01_error=error)
    return refused
