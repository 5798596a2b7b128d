"""The agent: keeps a session with the receiver, for as long as it runs, and answers for itself.

It holds no state that matters. What was written and is not yet durable at the receiver is in the
rings, what may differ is in the hot maps, how far things are is at the receiver: so it may be
killed at any instant, and a lost session is simply begun anew, with back-off.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from uuid import UUID

import trio

from blockrepl.channel.enrolment import Identity, load_identity, open_transport
from blockrepl.channel.framing import MessageStream
from blockrepl.channel.handshake import RECEIVER_SERVER_NAME, connect
from blockrepl.errors import BlockreplError, StateError
from blockrepl.formats.messages import AGENT_ACCEPTS, RECEIVER_ACCEPTS
from blockrepl.services.agent_session import AgentSession
from blockrepl.storage.clock import open_clock
from blockrepl.storage.home import Home, exclusive_lock
from blockrepl.storage.source import SourceDisks

log = logging.getLogger(__name__)

RETRY_SECONDS_MIN = 0.2
RETRY_SECONDS_MAX = 5.0


class Agent:
    """The running agent. ``session`` is None while there is none; ``problem`` says why."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.identity: Identity = load_identity(home.source_directory / "identity")
        self.clock = open_clock(home.source_directory)
        self.disks = SourceDisks(home)
        self.session: AgentSession | None = None
        self.problem: BlockreplError | None = StateError("not yet connected")

    async def run(self) -> None:
        """Keep a session until cancelled."""
        pause_seconds = RETRY_SECONDS_MIN
        while True:
            started = trio.current_time()
            try:
                await self._one_session()
            except BlockreplError as error:
                if self.problem is None or str(error) != str(self.problem):
                    log.warning("no session with %s: %s", self.identity.address, error)
                self.problem = error
            finally:
                self.session = None
            if trio.current_time() - started > RETRY_SECONDS_MAX:
                pause_seconds = RETRY_SECONDS_MIN
            await trio.sleep(pause_seconds * random.uniform(0.5, 1.0))
            pause_seconds = min(pause_seconds * 2, RETRY_SECONDS_MAX)

    async def _one_session(self) -> None:
        transport = await open_transport(self.identity.address)
        stream = await connect(transport, self.identity.context(), RECEIVER_SERVER_NAME)
        async with stream:
            messages = MessageStream(stream, {**AGENT_ACCEPTS, **RECEIVER_ACCEPTS})
            source = UUID(self.identity.source_id).bytes
            self.session = AgentSession(messages, source, self.disks, self.clock)
            self.problem = None
            log.info("connected to %s", self.identity.address)
            await self.session.run()


async def run_agent(home: Home, *, ready: Callable[[Agent], None]) -> None:
    """Run the agent of a home until cancelled. StateError when one runs already."""
    from blockrepl.services.agent_api import agent_application
    from blockrepl.services.control import serve_control

    with exclusive_lock(home.run_directory / "agent.lock", f"the source at {home.path}"):
        agent = Agent(home)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_control, agent_application(agent), home.agent_socket)
            ready(agent)
            await agent.run()
