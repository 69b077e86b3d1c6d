"""Retraining on a schedule: one tick trains a challenger on new data and decides whether it becomes the champion.

tick.py is what one command does; gate.py decides; decisions.py keeps what was decided, and moves the aliases to it;
hours.py counts what it all takes.
"""
