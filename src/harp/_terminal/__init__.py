"""What the program `harp` shows to people: tables, the page of one job, and completions for shells.

Texts of jobs and hosts come from other people. No control character, no change of direction and no markup in them
reaches the terminal.
"""
