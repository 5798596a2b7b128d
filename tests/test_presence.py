"""Which of two agents with one identity is let in, once one of them has gone."""

from __future__ import annotations

from blockrepl.model.presence import AWAY_SECONDS, Presence

WEB, MAIL = b"w" * 16, b"m" * 16
START = 1000.0


def test_the_earlier_agent_comes_back_when_the_later_has_been_away_for_long() -> None:
    presence = Presence(0.0)
    presence.ended(WEB, 2, START)
    presence.ended(MAIL, 2, START + 100)
    assert not presence.may_return(WEB, 1, 0, START + AWAY_SECONDS - 1)
    assert presence.may_return(WEB, 1, 0, START + AWAY_SECONDS)


def test_while_a_later_agent_has_a_session_the_earlier_stays_out() -> None:
    presence = Presence(0.0)
    assert not presence.may_return(WEB, 1, 2, START)
    assert presence.may_return(WEB, 2, 1, START)


def test_of_three_agents_the_latest_that_is_there_is_let_in() -> None:
    # 1 and 2 would end each other's sessions in turn otherwise, once 3 has gone.
    presence = Presence(0.0)
    presence.ended(WEB, 3, START)
    now = START + AWAY_SECONDS
    assert presence.may_return(WEB, 1, 0, now)
    assert presence.may_return(WEB, 2, 1, now)
    presence.ended(WEB, 1, now)
    assert not presence.may_return(WEB, 1, 2, now + AWAY_SECONDS)
    presence.ended(WEB, 2, now + 1)
    assert not presence.may_return(WEB, 1, 0, now + AWAY_SECONDS)


def test_a_receiver_that_has_just_started_waits_for_the_later_agent() -> None:
    presence = Presence(START)
    assert not presence.may_return(WEB, 1, 0, START + AWAY_SECONDS - 1)
    assert presence.may_return(WEB, 1, 0, START + AWAY_SECONDS)


def test_the_end_of_its_own_session_keeps_no_agent_out() -> None:
    presence = Presence(0.0)
    presence.ended(WEB, 1, START)
    assert presence.may_return(WEB, 1, 0, START)
