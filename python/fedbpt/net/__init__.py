"""HTTP, TLS and tokens: servers, bodies, certificates. Nothing here knows of tuning."""
