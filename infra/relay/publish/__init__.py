"""Events on their way to Kafka: batches, producers, what Kafka refuses, and what is published again."""
