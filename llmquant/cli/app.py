"""The command line: a thin caller of the Python API."""

import sys
import traceback

import typer

from llmquant.cli import look
from llmquant.cli.compare import compare, evaluate
from llmquant.cli.console import say
from llmquant.cli.export import export
from llmquant.cli.finetune import finetune
from llmquant.cli.options import EXAMPLES, JUDGE, MAKE, PUBLISH, RUN_EXAMPLES
from llmquant.cli.progress import JsonLines
from llmquant.cli.push import push
from llmquant.cli.run import run
from llmquant.cli.spellings import naming, normalise, suggestion
from llmquant.errors import Interrupted, LLMQuantError, RecipeError
from llmquant.ranks import n_ranks, said_by_another

app = typer.Typer(
    name="llmquant",
    help="Quantize Hugging Face causal LMs block by block, and prove the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog=EXAMPLES,
)


@app.callback()
def _root() -> None:
    pass


app.command(rich_help_panel=MAKE, epilog=RUN_EXAMPLES)(run)
app.command(
    name="eval", rich_help_panel=JUDGE, epilog="Example:  llmquant eval --model ./demo-W4A16-G128 --reference demo"
)(evaluate)
app.command(rich_help_panel=JUDGE, epilog="Example:  llmquant compare ./a-W4A16-G128 ./b-W4A16-G128 --reference ./a")(
    compare
)
app.command(rich_help_panel=MAKE, epilog="Example:  llmquant export ./out --format gguf --out ./out-gguf")(export)
app.command(
    rich_help_panel=MAKE, epilog="Example:  llmquant finetune ./demo-W4A16-G128 --reference demo --recover norms"
)(finetune)
app.command(rich_help_panel=PUBLISH, epilog="Example:  llmquant push ./demo-W4A16-G128 --repo user/demo-W4A16-G128")(
    push
)
look.register(app, run)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code. Every error of ours and of the system is one line on stderr."""
    caught: Exception | None = None
    ended: Interrupted | None = None
    arguments = normalise(sys.argv[1:] if arguments is None else arguments, look.options_of(app))
    try:
        if n_ranks() > 1 and (arguments[:1] != ["run"] or "--dry-run" in arguments):
            raise RecipeError(f"{n_ranks()} ranks", "llmquant run alone knows them", remedy="leave torchrun out")
        return int(app(args=arguments, prog_name="llmquant", standalone_mode=False) or 0)
    except typer.TyperException as error:  # unknown options, missing values
        message, code = suggestion(error) or error.format_message(), 2
    except Interrupted as error:
        message, code, ended = "interrupted", 75, error
    except typer.Abort:
        message, code = "aborted", 1
    except LLMQuantError as error:
        command = next((word for word in arguments if not word.startswith("-")), "")
        message, code, caught = error.message(naming(command, look.names_of_fields(app))), error.exit_code, error
    except OSError as error:  # the disk, a network file system, a permission: nothing of ours is wrong
        message, code, caught = f"{error.filename or 'the system'}: {error.strerror or error}", 1, error
    if said_by_another(caught or ended):
        return code
    if caught is not None and "--debug" in arguments:
        traceback.print_exception(caught)
    message = " ".join(message.split())
    if arguments[:1] == ["run"] and "--json" in arguments:
        JsonLines().say("error", message=message, exit_code=code)
    else:
        say(f"llmquant: {message}")
    return code
