"""What exists: traffic, servers, pools and services, as frozen specifications with their behaviour.

Here belongs what is true of the world whoever decides. Not here: how decisions are made (`control`), how
things evolve request by request (`engine`), and what the numbers mean in dollars (`metrics`).
"""
