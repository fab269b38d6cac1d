"""What every command knows: its settings and how to show its answer."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec
import typer

from deploy.data import DataDirectory, data_directory
from deploy.giving_up import USAGE, GiveUp
from deploy.output import Output
from deploy.settings import Settings

if TYPE_CHECKING:
    from deploy.client import Api

EPILOG = (
    "Every command takes --url, --token, --data and --log (or METERSTREAM_URL, _TOKEN, _DATA, _LOG), and --output, "
    "anywhere."
)


Command = TypeVar("Command", bound=Callable[..., object])


def flowing(command: Command) -> Command:
    """Let each paragraph of a command's help flow: Typer keeps the line breaks of all but the first."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    command.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return command


class Session(msgspec.Struct, frozen=True):
    """One run of the command line."""

    settings: Settings
    output: Output

    def api(self) -> "Api":
        """A client of the running server. Raises GiveUp when there is no token to show."""
        if not self.settings.token:
            raise GiveUp(
                "a token is needed: --token, or METERSTREAM_TOKEN; `meterstream serve` prints one on its first start "
                "and `meterstream tokens create` makes more", USAGE,
            )
        from deploy.client import Api  # its HTTP client takes a tenth of a second to load, and a gateway needs none

        return Api(self.settings.url, self.settings.token)

    @property
    def data(self) -> DataDirectory:
        """The files of the installation on this machine."""
        return data_directory(self.settings)


def session(context: typer.Context, *, page: bool = False) -> Session:
    """The session that the command line put into the context. Raises GiveUp for a page where there is none."""
    found = context.obj
    assert isinstance(found, Session)
    if found.output is Output.html and not page:
        raise GiveUp("--output html is for `meterstream reconcile`; here it is table, json or csv", USAGE)
    return found
