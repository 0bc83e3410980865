"""Campaigns against Preceptor: kills, damage and malformed input in large numbers, seeded and resumable.

    python -m campaigns soak --out build/campaigns        kills, crash points, full disks, flips, races
    python -m campaigns fuzz --out build/campaigns        malformed configurations, arguments, articles, corpora, models

``--seconds N`` stops early; the next call goes on where the last one stopped. Each class prints one line.
"""
