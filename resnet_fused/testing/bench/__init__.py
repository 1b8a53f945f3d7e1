"""The benchmark harness: cases, contenders, the gate before the clock, and the CSV that every picture is drawn from."""
