from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from cluster.autoscale.policies import Schedule
from experts.errors import ConfigError

WORKDAY = {"days": ["mon", "tue", "wed", "thu", "fri"], "start": "08:00", "end": "20:00", "replicas": 3}
NIGHT = {"days": ["fri"], "start": "22:00", "end": "06:00", "replicas": 5}


def at(fake_serve, policy, local: str) -> int:
    now = datetime.fromisoformat(local).replace(tzinfo=ZoneInfo(policy.timezone)).timestamp()
    return fake_serve(policy, now=now, target=2).tick(0)


@pytest.mark.parametrize(
    ("local", "replicas"),
    [
        ("2026-06-15T07:59:59", 1),  # a Monday
        ("2026-06-15T08:00:00", 3),
        ("2026-06-15T19:59:59", 3),
        ("2026-06-15T20:00:00", 1),
        ("2026-06-14T12:00:00", 1),  # Sunday
        ("2026-06-19T23:00:00", 5),  # Friday night
        ("2026-06-20T05:59:00", 5),  # still Friday's window
        ("2026-06-20T23:00:00", 1),
        ("2026-03-30T08:30:00", 3),  # the day after daylight saving time began
    ],
)
def test_follows_the_wall_clock(fake_serve, local, replicas):
    policy = Schedule(windows=[WORKDAY, NIGHT], timezone="Europe/Berlin")
    assert at(fake_serve, policy, local) == replicas


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"windows": []}, "windows must be a list"),
        ({"windows": [WORKDAY], "timezone": "Mars/Olympus"}, "timezone 'Mars/Olympus'"),
        ({"windows": [{**WORKDAY, "end": 1200}]}, r'windows\[0\].end must be a quoted "HH:MM", not 1200'),
        ({"windows": [WORKDAY, {**WORKDAY, "days": "mon"}]}, r"windows\[1\].days must be a list"),
        ({"windows": [{**WORKDAY, "replica": 1}]}, r"windows\[0\] needs start, end and replicas"),
        ({"windows": [{**WORKDAY, "replicas": 1.5}]}, r"windows\[0\].replicas must be a whole number"),
        ({"windows": [WORKDAY], "otherwise": 0}, "otherwise must be a whole number"),
    ],
)
def test_impossible_kwargs_are_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**kwargs)
