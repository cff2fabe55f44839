import io

import pytest
from rich.console import Console

from orchestrator.chat import ask, converse
from orchestrator.errors import ServeError
from tests.endpoint_kit import Server, chat_text, delta


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deltas") / "helper"
    delta(folder, 5)
    with Server(deltas=[str(folder)]) as made:
        yield made


class Typed(Console):
    """A console at which these lines are typed."""

    def __init__(self, *lines):
        super().__init__(file=io.StringIO(), width=200)
        self.lines = iter(lines)

    def input(self, *_, **__):
        try:
            return next(self.lines)
        except StopIteration:
            raise EOFError from None

    @property
    def shown(self):
        return self.file.getvalue()


def test_one_question(server):
    out = Typed()
    answer = ask("hello", model="tiny", url=f"{server.url}/v1", max_tokens=2, console=out)
    assert answer == chat_text(server, "hello", 2)[0]
    assert out.shown == answer + "\n"
    # the first delta answers unless another model is named
    assert ask("hello", url=f"{server.url}/v1", console=out) == ask(
        "hello", model="helper", url=f"{server.url}/v1", console=out
    )


def test_a_conversation_remembers_and_survives_a_refusal(server):
    seen = []
    render = server.tokenizer.apply_chat_template
    server.tokenizer.apply_chat_template = lambda m, **k: seen.append([x["role"] for x in m]) or render(m, **k)
    out = Typed(
        "/models", "/model tiny", "hi", "/model nobody", "hi again", "/model tiny", "more", "/clear", "new", "/x"
    )
    try:
        converse(url=f"{server.url}/v1", max_tokens=3, system="be brief", console=out)
    finally:
        del server.tokenizer.apply_chat_template
    system, turn = ["system"], ["user", "assistant"]
    assert [s for s in seen if s] == [
        [*system, "user"],
        [*system, *turn, "user"],  # refused: nobody of that name
        [*system, *turn, "user"],
        [*system, "user"],
    ]
    assert "helper, tiny" in out.shown
    assert "nobody" in out.shown
    assert "/exit to leave" in out.shown


def test_no_endpoint_is_one_clear_error():
    with pytest.raises(ServeError, match="manta serve"):
        ask("hello", url="http://127.0.0.1:9/v1")
