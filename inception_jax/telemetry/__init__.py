"""What a run says of itself: metrics on the device, their files, a clock, a progress display.

CLU is used here and nowhere else, so that a change of its interface touches one folder.
"""
