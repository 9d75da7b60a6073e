#!/usr/bin/env python3
"""Writes records.txt: TLS 1.3 records sealed by Python's `cryptography` (OpenSSL), from traffic
secrets, by the text of RFC 8446 (5.2, 5.3, 7.2, 7.3) and nothing of this repository.

    python3 make.py > records.txt

One line a record, fields in hexadecimal but for the numbers:
suite, traffic secret, generation (how often the key was updated), key, iv, sequence number,
content type, content, zero bytes of padding, record.
"""
import hashlib
import sys

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

SUITES = {
    "AES_128_GCM_SHA256": (hashes.SHA256, 16),
    "AES_256_GCM_SHA384": (hashes.SHA384, 32),
}


def expand_label(algorithm, secret, label, length):
    label = b"tls13 " + label
    info = length.to_bytes(2, "big") + bytes([len(label)]) + label + b"\0"
    return HKDFExpand(algorithm=algorithm(), length=length, info=info).derive(secret)


def record(key, iv, sequence, content_type, content, padding):
    inner = content + bytes([content_type]) + bytes(padding)
    header = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
    counter = sequence.to_bytes(12, "big")
    nonce = bytes(a ^ b for a, b in zip(iv, counter))
    return header + AESGCM(key).encrypt(nonce, inner, header)


def pattern(seed, length):
    block, data = seed.encode(), b""
    while len(data) < length:
        block = hashlib.sha256(block).digest()
        data += block
    return data[:length]


def main():
    print("# Made by make.py; see there.")
    for suite, (algorithm, key_length) in SUITES.items():
        secret = pattern(suite, algorithm.digest_size)
        for generation in range(3):
            key = expand_label(algorithm, secret, b"key", key_length)
            iv = expand_label(algorithm, secret, b"iv", 12)
            for sequence, content_type, length, padding in [
                (0, 23, 50, 0),
                (1, 22, 5, 0),
                (2, 21, 2, 0),
                (3, 23, 1, 0),
                (255, 23, 257, 31),
                (2**32 + 7, 23, 100, 0),
                (2**64 - 2, 23, 16, 1),
            ]:
                content = pattern(f"{suite} {sequence}", length)
                sealed = record(key, iv, sequence, content_type, content, padding)
                fields = [suite, secret.hex(), generation, key.hex(), iv.hex(), sequence]
                fields += [content_type, content.hex(), padding, sealed.hex()]
                print(*fields)
            secret = expand_label(algorithm, secret, b"traffic upd", algorithm.digest_size)


sys.exit(main())
