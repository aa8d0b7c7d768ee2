"""`payments demo`: real orders through real servers, with faults and a crash, and the books compared at the end."""
