//! The local authority and loading of certificates: what is issued, and clear errors.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use common::{authority, ca_pem, ca_pem_with, identity};
use rcgen::{IsCa, KeyPair, KeyUsagePurpose};
use tempfile::TempDir;
use tls::{Authority, ServerSettings, WorkloadCertificate};
use x509_parser::prelude::*;

/// Writes files and loads an authority from them.
struct Files {
    directory: TempDir,
}

impl Files {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        Self { directory }
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// The error of loading this CA, checked to be one line naming a file.
    fn error(&self, certificate: &str, key: &str) -> String {
        let certificate = self.write("ca.pem", certificate);
        let key = self.write("ca-key.pem", key);
        let message = Authority::from_pem_files(&certificate, &key)
            .unwrap_err()
            .to_string();
        assert!(!message.contains('\n'), "{message}");
        assert!(
            message.contains(&*self.directory.path().to_string_lossy()),
            "{message}"
        );
        message
    }
}

#[test]
fn what_is_issued() {
    let authority = authority("mesh");
    let id = identity("cluster.local", "web");
    let before = SystemTime::now();
    let issued = authority.issue(&id, Duration::from_secs(3600)).unwrap();
    assert_eq!(issued.chain().len(), 2);
    assert_eq!(issued.chain()[1..], *issued.roots());
    let (rest, leaf) = X509Certificate::from_der(&issued.chain()[0]).unwrap();
    assert_eq!(rest, []);
    assert_eq!(leaf.subject().iter().count(), 0, "no subject");
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical);
    assert_eq!(names.value.general_names, [GeneralName::URI(id.uri())]);
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth && !usage.any);
    let usage = leaf.key_usage().unwrap().unwrap();
    assert_eq!(usage.value.flags, 1, "digital signature only");
    assert!(!leaf.is_ca());
    let curve = leaf.public_key().algorithm.parameters.as_ref().unwrap();
    assert_eq!(
        curve.as_oid().unwrap().to_id_string(),
        "1.2.840.10045.3.1.7",
        "P-256"
    );
    let (_, ca) = X509Certificate::from_der(&issued.roots()[0]).unwrap();
    leaf.verify_signature(Some(ca.public_key())).unwrap();
    let info = issued.info();
    assert!(info.not_before < before && info.not_before > before - Duration::from_secs(600));
    let left = info.not_after.duration_since(before).unwrap().as_secs();
    assert!((3598..=3600).contains(&left), "{left}");
    assert_eq!(info.serial, leaf.serial.to_string());
    let again = authority.issue(&id, Duration::from_secs(3600)).unwrap();
    assert_ne!(again.info().serial, info.serial);
}

#[test]
fn nothing_outlives_the_authority() {
    let authority = authority("mesh");
    let issued = authority
        .issue(&identity("td", "web"), Duration::MAX)
        .unwrap();
    let (_, ca) = X509Certificate::from_der(&issued.roots()[0]).unwrap();
    let (_, leaf) = X509Certificate::from_der(&issued.chain()[0]).unwrap();
    assert_eq!(leaf.validity().not_after, ca.validity().not_after);
}

#[test]
fn missing_and_malformed_files() {
    let files = Files::new();
    let (certificate, key) = ca_pem("mesh");
    let missing = files.directory.path().join("missing.pem");
    let present = files.write("key.pem", &key);
    let message = Authority::from_pem_files(&missing, &present)
        .unwrap_err()
        .to_string();
    assert!(
        message.starts_with("cannot read CA certificate /"),
        "{message}"
    );
    assert!(message.contains("missing.pem: No such file"), "{message}");
    let present = files.write("cert.pem", &certificate);
    let message = Authority::from_pem_files(&present, &missing)
        .unwrap_err()
        .to_string();
    assert!(message.starts_with("cannot read CA key /"), "{message}");

    for (certificate, key, expected) in [
        ("", &*key, "no usable CA certificate in"),
        ("garbage", &key, "no usable CA certificate in"),
        (&key, &key, "there is no section BEGIN CERTIFICATE"),
        (
            &certificate,
            &certificate,
            "there is no section BEGIN PRIVATE KEY",
        ),
        (&certificate[..200], &key, "no usable CA certificate in"),
    ] {
        let message = files.error(certificate, key);
        assert!(message.contains(expected), "{message}");
    }
    let cut = certificate.replacen("MII", "AAA", 1);
    let message = files.error(&cut, &key);
    assert!(message.contains("is not an X.509 certificate"), "{message}");
    let two = format!("{certificate}{certificate}");
    let message = files.error(&two, &key);
    assert!(message.contains("holds 2 certificates"), "{message}");
    let huge = "x".repeat((1 << 20) + 1);
    let message = files.error(&huge, &key);
    assert!(message.contains("more than 1048576 bytes"), "{message}");
}

#[test]
fn keys_of_another_certificate() {
    let files = Files::new();
    let (certificate, _) = ca_pem("mesh");
    let (_, other_key) = ca_pem("mesh");
    let message = files.error(&certificate, &other_key);
    assert!(
        message.contains("does not fit the certificate in"),
        "{message}"
    );
    assert!(message.contains("ca-key.pem"), "{message}");
}

#[test]
fn certificates_that_are_no_authority() {
    let files = Files::new();
    let (certificate, key) = ca_pem_with("mesh", |params| params.is_ca = IsCa::ExplicitNoCa);
    let message = files.error(&certificate, &key);
    assert!(message.contains("do not say CA:TRUE"), "{message}");
    let (certificate, key) = ca_pem_with("mesh", |params| {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    });
    let message = files.error(&certificate, &key);
    assert!(
        message.contains("does not include certificate signing"),
        "{message}"
    );
}

#[test]
fn authorities_outside_their_validity() {
    let files = Files::new();
    let (certificate, key) = ca_pem_with("mesh", |params| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    });
    let message = files.error(&certificate, &key);
    assert!(
        message.contains("is expired; valid from 2020-01-01"),
        "{message}"
    );
    let (certificate, key) = ca_pem_with("mesh", |params| {
        params.not_before = rcgen::date_time_ymd(2090, 1, 1);
    });
    let message = files.error(&certificate, &key);
    assert!(
        message.contains("is not valid yet; valid from 2090-01-01"),
        "{message}"
    );
}

#[test]
fn authorities_of_other_kinds_issue_as_well() {
    for algorithm in [
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ED25519,
        &rcgen::PKCS_RSA_SHA256,
    ] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        let certificate = params.self_signed(&key).unwrap().pem();
        let authority =
            Authority::from_pem(certificate.as_bytes(), key.serialize_pem().as_bytes()).unwrap();
        authority
            .issue(&identity("td", "web"), Duration::from_secs(60))
            .unwrap();
    }
}

#[test]
fn workload_certificates_from_files() {
    let files = Files::new();
    let (ca, ca_key) = ca_pem("mesh");
    let issuer = rcgen::Issuer::from_ca_cert_pem(&ca, KeyPair::from_pem(&ca_key).unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    let uri = "spiffe://td/ns/default/sa/web";
    params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into().unwrap())];
    let leaf = params.signed_by(&key, &issuer).unwrap().pem();

    let chain = files.write("chain.pem", &format!("{leaf}{ca}"));
    let key = files.write("key.pem", &key.serialize_pem());
    let roots = files.write("roots.pem", &ca);
    let certificate = WorkloadCertificate::from_pem_files(&chain, &key, &roots).unwrap();
    assert_eq!(certificate.chain().len(), 2);
    assert_eq!(
        ServerSettings::new(&certificate).unwrap().trust_domain(),
        "td"
    );
    assert!(!format!("{certificate:?}").contains("key"));

    let other = files.write("other.pem", &ca_key);
    let error = WorkloadCertificate::from_pem_files(&chain, &other, &roots).unwrap_err();
    assert!(
        error.to_string().contains("other.pem does not fit"),
        "{error}"
    );
    let error = WorkloadCertificate::from_pem_files(&chain, &key, &key).unwrap_err();
    assert!(
        error.to_string().contains("no usable root certificate"),
        "{error}"
    );
}

#[test]
fn servers_need_an_identity_of_their_own() {
    let (ca, key) = ca_pem("mesh");
    let own = WorkloadCertificate::from_pem(ca.as_bytes(), key.as_bytes(), ca.as_bytes()).unwrap();
    let error = ServerSettings::new(&own).unwrap_err().to_string();
    assert!(
        error.contains("own certificate holds no URI name"),
        "{error}"
    );
}
