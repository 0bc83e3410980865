"""Study: which passages of a mixed pool to read, a skill that holds on articles that were never seen.

A pool mixes sentence pairs of several articles, and the context says which one matters: by questions (mode ``asked``)
or by one of its sentences (mode ``seed``). ``loop.py`` is the method from top to bottom.
"""
