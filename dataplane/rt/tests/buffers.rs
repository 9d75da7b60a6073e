//! Buffers against a model: random operations on [`rt::buf::Buf`] and on plain vectors must agree,
//! and neighbours of one block must never see each other's bytes.

#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]
use std::cell::RefCell;
use std::net::{Ipv4Addr, TcpListener};
use std::rc::Rc;

use rt::buf::{Buf, Pool};
use rt::net::{ConnectOptions, connect};
use rt::{Backend, Runtime};
use testkit::Random;

mod both;

/// A buffer and what it must hold.
struct Pair {
    buf: Buf,
    model: Vec<u8>,
}

/// The pool of a runtime; there is no other way to have one.
fn with_pool(test: impl FnOnce(Pool)) {
    let mut runtime = Runtime::new(both::with(Backend::Epoll)).unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let found = Rc::new(RefCell::new(None));
    let out = Rc::clone(&found);
    runtime
        .run(async move {
            let stream = connect(addr, &ConnectOptions::default()).await.unwrap();
            *out.borrow_mut() = Some(stream.split().1.pool().clone());
        })
        .unwrap();
    let pool = found.borrow_mut().take().unwrap();
    test(pool);
}

fn fresh(pool: &Pool, random: &mut Random) -> Pair {
    let buf = if random.below(4) == 0 {
        pool.large()
    } else {
        pool.record()
    };
    let model = Vec::new();
    Pair { buf, model }
}

fn step(pool: &Pool, pairs: &mut Vec<Pair>, random: &mut Random) {
    if pairs.is_empty() || pairs.len() < 40 && random.below(6) == 0 {
        pairs.push(fresh(pool, random));
    }
    let at = random.below(pairs.len());
    let Pair { buf, model } = &mut pairs[at];
    match random.below(8) {
        0 => {
            let n = random.below(buf.head_room().min(64) + 1);
            buf.grow_head(n);
            let fill = random.below(256) as u8;
            buf[..n].fill(fill);
            model.splice(..0, std::iter::repeat_n(fill, n));
        }
        1 => {
            let n = random.below(buf.tail_room().min(300) + 1);
            buf.grow_tail(n);
            model.extend(std::iter::repeat_n(0, n));
        }
        2 | 3 => {
            let n = random.below(buf.tail_room().min(3000) + 1);
            let bytes: Vec<u8> = (0..n).map(|_| random.below(256) as u8).collect();
            buf.extend_from_slice(&bytes);
            model.extend(bytes);
        }
        4 => {
            let n = random.below(buf.len() + 1);
            let front = buf.split_to(n);
            let front_model = model.drain(..n).collect();
            let (buf, model) = (front, front_model);
            pairs.push(Pair { buf, model });
        }
        5 => {
            let n = random.below(buf.len() + 1);
            buf.advance(n);
            model.drain(..n);
        }
        6 => {
            let n = random.below(buf.len() + 20);
            buf.truncate(n);
            model.truncate(n);
        }
        _ if random.below(3) == 0 => drop(pairs.swap_remove(at)),
        _ => {
            let n = random.below(buf.len() + 1);
            buf[..n].reverse();
            model[..n].reverse();
        }
    }
}

#[test]
fn random_operations_agree_with_vectors() {
    with_pool(|pool| {
        for seed in 1..=40_u64 {
            let mut random = Random::new(seed);
            let mut pairs = Vec::new();
            for n in 0..1_500 {
                step(&pool, &mut pairs, &mut random);
                for Pair { buf, model } in &pairs {
                    assert!(
                        buf[..] == model[..],
                        "seed {seed}, step {n}: {buf:?} differs"
                    );
                }
            }
            pairs.clear();
            assert_eq!(pool.other_blocks_in_use(), 0, "seed {seed}");
        }
    });
}
