"""HTTP, TLS and tokens: servers, message bodies, certificates. Independent of tuning."""
