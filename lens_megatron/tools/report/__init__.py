"""Makes one HTML file of one or more runs, `lens-report RUN [RUN ...]`.

run_data and rollout_groups read what runs left, seeds puts the seeds of one configuration together, shares and speed_up
count, charts draws, page puts all of it into template.html, and command is what a user starts.
"""
